"""Build the data on which the demo's tiny student was pretrained: drawings with names and tags.

    python -m dev.build_icons --packages DIR --out runs/icons

then `dev/pretrain_student.py`. DIR holds the unpacked packages that `dev/icons/catalog.py` names: those of npm as
`npm pack` calls their files (without `.tgz`), those of Debian as `dpkg-deb -x` leaves them, each in a folder of the
package's name. Rendering needs PyPI `resvg-py` 0.5.0. Takes three minutes on one core.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pyarrow as pa

from dev.build_emoji import TEST_COLUMNS, TRAIN_COLUMNS, write_table
from dev.icons import catalog, rows

QUALITY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    built = rows.build(list(catalog.drawings(options.packages)), catalog.search_terms(options.packages))
    for name, train in built.train.items():
        columns = dict(zip(TRAIN_COLUMNS, zip(*train, strict=True), strict=True))
        write_table(
            pa.table({k: pa.array(v, pa.string()) for k, v in columns.items()}), _file(options.out, "train", name)
        )
        print(f"{name}: {len(train):,} rows, {len({(r[2], r[3]) for r in train}):,} targets")
    for name, test in built.test.items():
        columns = dict(zip(TEST_COLUMNS, zip(*test, strict=True), strict=True))
        write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), _file(options.out, "test", name))
    encoded = [_encode(image) for image in built.images.values()]
    store = {"path": pa.array(list(built.images), pa.string()), "bytes": pa.array(encoded, pa.binary())}
    write_table(pa.table(store), options.out / "images.parquet")
    print(f"{len(encoded):,} images, {sum(map(len, encoded)) / 2**20:.1f} MiB")


def _file(out: Path, split: str, name: str) -> Path:
    return out / split / f"{name}.parquet"


def _encode(image: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY, method=4)  # type: ignore[attr-defined]
    return stream.getvalue()


if __name__ == "__main__":
    main()
