"""Training sets of MMEB-V2: folders of frames, pages inside parquet files, and a run over both."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from PIL import Image

from b3.data.datasets import load_pairs
from b3.data.images import RowGroups
from b3.errors import DataError


def page(number: int) -> bytes:
    """A PNG whose size tells its row."""
    stream = io.BytesIO()
    Image.fromarray(np.full((40 + number, 60, 3), 10 * number, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_pages(folder: Path, rows: int = 12, files: int = 2, struct: bool = True) -> str:
    """Pages in several files of several row groups."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        images = [{"bytes": page(i), "path": None} if struct else page(i) for i in part]
        columns: dict[str, Any] = {
            "query": [f"what is on page {i}?" for i in part],
            "answer": [f"number {i}" for i in part],
            "source": ["ChartQA"] * len(part),
            "image": pa.array(images, kind),
        }
        pq.write_table(pa.table(columns), folder / f"train-{number:05d}.parquet", row_group_size=3)
    return f"parquet:{folder}/train-*.parquet"


def write_films(folder: Path, rows: int = 12) -> str:
    """Folders of frames and one conversation each."""
    talks = []
    for number in range(rows):
        (folder / "frames" / f"v{number}").mkdir(parents=True, exist_ok=True)
        for step in range(4):
            image = tiny.image(tiny.COLOURS[number % 8], tiny.SHAPES[step], number)
            (folder / "frames" / f"v{number}" / f"c_{step:04d}.jpeg").write_bytes(image)
        asked = {"from": "human", "value": "<video>\nWhat is seen?"}
        seen = {"from": "gpt", "value": f"a {tiny.COLOURS[number % 8]} thing number {number}"}
        talks.append({"id": str(number), "video": f"v{number}", "conversations": [asked, seen]})
    file = folder / "talks.jsonl"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return f"jsonl:{file}"


@pytest.mark.parametrize("struct", [True, False])
def test_each_row_has_its_own_page(tmp_path: Path, struct: bool) -> None:
    source = write_pages(tmp_path, struct=struct)
    data = load_pairs(source, "pages", form="visrag")
    again = pickle.loads(pickle.dumps(data.target(7)))  # as a worker gets it
    assert again.open_image().size == (60, 47)
    for row in [11, 0, 5, 6, 3, 8]:
        assert data.query(row).text.endswith(f"page {row}?")
        assert data.target(row).open_image().size == (60, 40 + row)
    assert len(load_pairs(source, "pages", form="vidore", max_rows=4)) == 4
    asked = load_pairs(source, "pages", form="vidore_qa")
    assert asked.query(9).open_image().size == (60, 49) and asked.target(9).text == "number 9"


def test_loading_reads_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pages(tmp_path)
    read: list[list[str]] = []
    real = pq.ParquetFile.iter_batches

    def iter_batches(file: Any, rows: int, columns: list[str]) -> Any:
        read.append(columns)
        return real(file, rows, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    monkeypatch.setattr(RowGroups, "value", lambda self, group, row: pytest.fail("an image was read"))
    data = load_pairs(source, "pages", form="visrag")
    assert len(data) == 12 and read == [["query", "answer", "source"]] * 2


def test_pages_of_the_hub_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pages(tmp_path / "someone" / "pages")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = load_pairs("hub:someone/pages", "default", form="visrag")
    assert data.target(10).open_image().size == (60, 50)


def test_videos_are_folders_of_frames(tmp_path: Path) -> None:
    source, frames = write_films(tmp_path), str(tmp_path / "frames")
    data = load_pairs(source, "films", form="llava_hound_caption", image_dir=frames)
    (video,) = data.query(2).videos
    assert [Path(str(frame.source)).name for frame in video.frames] == [f"c_{step:04d}.jpeg" for step in range(4)]
    back = load_pairs(source, "films", form="llava_hound_video", image_dir=frames)
    assert back.query(2).text.endswith(data.target(2).text) and back.target(2).videos == data.query(2).videos


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("llava_hound_caption", {"video": "v0", "conversations": [{"value": "a"}, {"value": "b"}]}, "0 <video>"),
        ("llava_hound_qa", {"video": "v0", "conversations": [{"value": "<video>"}]}, "1 turns in the conversation"),
        ("llava_hound_video", {"conversations": [{"value": "a"}, {"value": "b"}]}, "no key 'video'"),
        ("vidore_qa", {"query": "q", "image": "a.jpg"}, "no key 'answer'"),
        ("visrag", {"query": 3, "image": "a.jpg"}, "'query' is int, a text is needed"),
        ("vidore", {"query": "q", "image": ""}, "'image' is missing; a path or the image is needed"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_one_that_would(
    tmp_path: Path, form: str, row: dict[str, Any], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"row 0: .*a row of format") as caught:
        load_pairs(f"jsonl:{tmp_path / 'rows.jsonl'}", "own", image_dir=str(tmp_path), form=form)
    assert message in str(caught.value)


def test_a_missing_frame_folder_is_named(tmp_path: Path) -> None:
    source = write_films(tmp_path)
    data = load_pairs(source, "films", form="llava_hound_qa", image_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"films row 0: video .*v0 does not exist"):
        data.query(0)


def test_a_run_mines_and_trains_on_all_three_modalities(tmp_path: Path) -> None:
    """Each data set has a plan of its own, by a teacher that reads images, frames and pages; the loss is finite."""
    from b3.config import load_config
    from b3.mining.recipe import mine_recipe
    from b3.train.run import train

    tiny.write_data(tmp_path / "data", rows=24)
    tiny.write_model(tmp_path / "model")
    frames = str(tmp_path / "films" / "frames")
    datasets = [
        {"subset": "pictures"},
        {"subset": "films", "format": "llava_hound_video", "source": write_films(tmp_path / "films", 24),
         "image_dir": frames},
        {"subset": "pages", "format": "visrag", "source": write_pages(tmp_path / "pages", 24), "image_dir": None},
    ]  # fmt: skip
    tree = tiny.recipe(tmp_path, batch={"size": 8, "policy": "b3"}, train={"steps": 6, "save_every": 6})
    tree["data"]["datasets"] = datasets
    tree["mining"]["teacher"] = tree["model"]["name"]
    tree["model"]["max_frames"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "recipe.yaml")
    plans = mine_recipe(config)
    assert {name: plan.communities.shape for name, plan in plans.items()} == dict.fromkeys(
        ("pictures", "films", "pages"), (6, 4)
    )
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(np.isfinite(line["loss"]) for line in lines)
