"""A recipe: its sections, their keys, types and defaults, and what contradicts itself within one section.

`MiningOptions` are also the arguments of `b3.mining.mine`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from b3.config.section import Section, entry
from b3.config.training import Family, TrainConfig

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]

AUTHORS: dict[str, Any] = {"partitioner": "paper", "edges": "mutual"}  # what preset paper says of other keys


class ModelConfig(Section):
    name: str = Field(description="hub name or folder of the backbone (or of an adapter repository)")
    init_adapter: str | None = Field(None, description="adapter to continue from; its shape must be that of `adapter`")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights; auto: bfloat16 on GPU"
    )
    attention: Literal["auto", "varlen", "sdpa"] = Field(
        "auto",
        description="varlen: torch's kernel for packed sequences (GPU, 16 bit); sdpa: any device; auto: varlen if it"
        " runs",
    )
    min_pixels: int | None = Field(None, gt=0, description="smallest image, pixels; null: the checkpoint's")
    max_pixels: int | None = Field(
        None, gt=0, description="largest image, pixels (28*28 per token); null: the checkpoint's"
    )
    max_length: int | None = Field(None, gt=0, description="cut text-only items to this many tokens")
    positions: Literal["1d", "mrope"] | None = Field(
        None, description="rotary positions; null: the checkpoint's, which is 1d for all B3 and VLM2Vec models"
    )
    pooling: Literal["auto", "last", "mean", "cls"] = Field(
        "auto", description="last for Qwen2-VL, mean or cls for text encoders; auto: what the checkpoint says"
    )
    prompt: str | None = Field(
        None,
        description="how items are written: a rule of b3/model/prompts.py or a .jinja file; null: the checkpoint's",
    )
    max_frames: int | None = Field(None, gt=0, description="most frames of a video; null: the checkpoint's")
    dim: int | None = Field(
        None, gt=0, description="cut vectors to their first so many numbers; null: the checkpoint's, which is whole"
    )
    quantize: Literal["nf4"] | None = Field(
        None, description="nf4: the frozen decoder layers in 4 bit (QLoRA); needs a GPU and pip install bitsandbytes"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    compile: bool | Literal["auto"] = Field(
        False, description="compile decoder layers and vision blocks (inductor); auto: on a GPU, if it works there"
    )
    shard: bool = Field(False, description="spread the decoder layers' frozen weights over the ranks (FSDP2)")
    train: Literal["adapter", "full"] = Field("adapter", description="full: all weights, in float32, without adapter")
    freeze: list[str] = Field(
        [], description="regular expressions; parameters whose name matches one (re.search) stay fixed"
    )

    def settings(self) -> dict[str, Any]:
        """What the recipe asks for of `b3.model.settings.Settings`; the rest is the checkpoint's."""
        names = ("min_pixels", "max_pixels", "max_length", "positions", "prompt", "max_frames", "dim")
        settings = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return settings if self.pooling == "auto" else {**settings, "pooling": self.pooling}

    @model_validator(mode="after")
    def _full(self) -> ModelConfig:
        if self.shard and self.compile is True:
            raise ValueError("model.compile true does not go with model.shard: sharded layers run as they are")
        if self.train == "full" and self.init_adapter is not None:
            raise ValueError(
                "model.init_adapter would not be loaded: model.train full starts from the weights of model.name;"
                " give the adapter's repository as model.name, which merges it"
            )
        return self


class AdapterConfig(Section):
    r: int = Field(8, gt=0, description="rank")
    alpha: int = Field(64, gt=0, description="scale is alpha / r")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the adapter's input")
    use_dora: bool = Field(True, description="weight-decomposed (DoRA), as the released models")
    init: Literal["gaussian", "kaiming"] = Field("gaussian", description="of the A matrices")
    target_modules: str | list[str] | None = Field(
        None,
        description="regular expression or suffixes of linear layers; null: the paper's (language model q k v o down),"
        " all linear layers of a text encoder",
    )


Format = Literal[
    "mmeb", "triplets", "swift", "tevatron",
    "llava_hound_caption", "llava_hound_video", "llava_hound_qa", "vidore", "vidore_qa", "visrag",
]  # fmt: skip


class DatasetConfig(Section):
    subset: str = Field(description="name of the subset: hub configuration, folder or file stem")
    family: Family = Field("retrieval", description="decides the rank window's default p")
    source: str | None = Field(None, description="overrides data.source")
    split: str | None = Field(None, description="overrides data.split")
    format: Format | None = Field(None, description="overrides data.format")
    image_dir: str | None = Field(None, description="overrides data.image_dir")
    max_rows: int | None = Field(None, gt=1, description="use only the first rows")
    p: int | None = Field(None, ge=0, description="overrides mining.p for this data set")
    m: int | None = Field(None, gt=0, description="overrides mining.m for this data set")
    weight: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="its rows are seen this many times as often as with 1; at most 1: no row twice in an epoch",
    )
    closed: bool = Field(
        False,
        description="a row's only negatives are its own (neg_text), as the options of a question; other rows' targets"
        " are none. Needs negatives.source data",
    )


class DataConfig(Section):
    source: str = Field(description="embedded:NAME, hub:OWNER/NAME, parquet:PATH or jsonl:PATH")
    split: str = Field("train", description="'original' or 'diverse_instruction' in MMEB-train")
    format: Format = Field(
        "mmeb",
        description="of the rows: mmeb, triplets (sentence-transformers), swift (ms-swift), tevatron, or a training set"
        " of MMEB-V2 (docs/data.md)",
    )
    image_dir: str | None = Field(None, description="folder (or .parquet) of the images; embedded data brings its own")
    prefix_targets: bool = Field(True, description="put the paper's prefixes before text-only targets")
    bad_images: Literal["fail", "replace"] = Field(
        "fail", description="a row with an unreadable image ends the run, or is replaced by another row"
    )
    max_bad_images: int = Field(100, gt=0, description="rows that may be replaced in a run (with bad_images replace)")
    datasets: list[DatasetConfig] = Field(min_length=1, description="the data sets to train on")

    @model_validator(mode="after")
    def _unique(self) -> DataConfig:
        names = [d.subset for d in self.datasets]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"subset(s) {', '.join(twice)} listed twice")
        return self


class MiningKeys(Section):
    """What decides over a plan, beside the vectors: declared here for recipes, `mine()`, command line and manifest."""

    m: Positive = Field(100, description="width of the window of ranks [p, p + m)")
    community_size: Positive = Field(32, description="rows K of a community; recipes may say k")
    seed: Count = Field(0, description="of all random choices of mining; not the seed of training")
    edges: Literal["union", "mutual"] | None = Field(
        None,
        description="when two rows are linked: union, one has the other in its window; mutual, both have (the paper);"
        " null: mutual for partitioner paper, union otherwise",
    )
    veto: bool = Field(True, description="drop an edge if either row ranks the other above p (mutual implies it)")
    partitioner: Annotated[str, entry("miner")] = Field(
        "anneal",
        description="anneal: swaps from random communities; paper: k-way METIS and the authors' repair (needs pymetis);"
        " kmeans: balanced k-means, no windows; random",
    )
    refine_passes: Count = Field(30, description="passes of annealed swaps (partitioner anneal)")
    piece_rows: Positive | None = Field(
        None, description="cut larger data sets into pieces of at most so many rows first, by balanced k-means"
    )
    search: Literal["exact", "ivf"] = Field("exact", description="ivf: approximate ranking, for millions of rows")
    preset: Literal["paper"] | None = Field(
        None,
        description="paper: all that the authors' code does, mining (mutual edges, METIS, classes by label), the draw"
        " of hard negatives, the same batches every epoch, and no mask in the loss",
    )

    @model_validator(mode="after")
    def _consistent(self) -> MiningKeys:
        if self.preset == "paper":
            for key, value in AUTHORS.items():
                if getattr(self, key) not in (value, type(self).model_fields[key].default):
                    raise ValueError(f"{key} {getattr(self, key)} contradicts preset paper, which is {value}")
        if self.partitioner == "paper" and self.edges == "union":
            raise ValueError("partitioner paper works on mutual edges, not union; leave edges out")
        if self.piece_rows is not None and self.piece_rows < 2 * self.community_size:
            raise ValueError(f"piece_rows is {self.piece_rows}; give an integer of at least {2 * self.community_size}")
        return self


class MiningOptions(MiningKeys):
    """The parameters of `b3.mining.mine`; the manifest of a plan is their dump, what follows from others filled in."""

    p: Count = Field(30, description="ranks skipped at the top: targets there are likely to be right")
    hard_negatives: Count = Field(5, description="hard negatives drawn per row; 0: none")
    classification: bool = Field(False, description="the targets are class labels; decides over preset paper alone")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Python's own numbers for numpy's, and one spelling for options that mean the same."""
        values = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
        if values.get("preset") == "paper":
            values |= {key: value for key, value in AUTHORS.items() if values.get(key) in (None, "anneal")}
        else:
            values["classification"] = False
        if values.get("edges") is None:
            values["edges"] = "mutual" if values.get("partitioner") == "paper" else "union"
        if values["edges"] == "mutual":
            values["veto"] = True
        return values

    @property
    def by_label(self) -> bool:
        """Whether rows are joined by their nearest labels, as the authors' code does for classification."""
        return self.preset == "paper" and self.classification


class MiningConfig(MiningKeys):
    """The section `mining` of a recipe."""

    dir: str = Field(description="folder of the batch plans, one sub-folder per data set")
    teacher: str = Field(
        description="'embedded', a checkpoint, st:NAME (sentence-transformers), or a folder of SUBSET_queries.npy and"
        " SUBSET_targets.npy"
    )
    teacher_adapter: str | None = Field(None, description="adapter of a teacher checkpoint")
    teacher_prompt: str | None = Field(
        None, description="how a teacher checkpoint's items are written, as model.prompt; null: as its settings say"
    )
    teacher_dim: Positive | None = Field(None, description="cut the teacher's vectors to their first so many numbers")
    batch_tokens: Positive | None = Field(
        None, description="tokens of one forward pass of a teacher checkpoint; null: 16384 on a GPU, 2048 on a CPU"
    )
    p: Count | dict[Family, Count] = Field(30, description="ranks skipped at the top; a number, or one per family")

    @model_validator(mode="before")
    @classmethod
    def _short_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "k" not in values:
            return values
        values = dict(values)
        size = values.pop("k")
        if values.setdefault("community_size", size) != size:
            raise ValueError(f"k {size} and community_size {values['community_size']} are one key; give one of them")
        return values

    def p_of(self, dataset: DatasetConfig) -> int:
        """Ranks to skip for a data set."""
        if dataset.p is not None:
            return dataset.p
        return self.p if isinstance(self.p, int) else self.p.get(dataset.family, 30)

    def options_for(self, dataset: DatasetConfig, hard_negatives: int) -> MiningOptions:
        """What `mine` takes for a data set of the recipe."""
        keys = {key: getattr(self, key) for key in MiningKeys.model_fields}
        keys |= {"p": self.p_of(dataset), "m": dataset.m or self.m, "hard_negatives": hard_negatives}
        return MiningOptions.model_validate({**keys, "classification": dataset.family == "classification"})


class NegativesConfig(Section):
    per_query: int = Field(0, ge=0, description="hard negatives h per query (B3++: 5)")
    source: Literal["mined", "data"] = Field(
        "mined", description="data: the first h that a row brings along (neg_text, neg_image_path)"
    )
    after_random: bool = Field(
        False, description="mined ones begin after batch.random_steps: until then a step encodes no hard negatives"
    )

    @model_validator(mode="after")
    def _effective(self) -> NegativesConfig:
        if self.source == "data" and not self.per_query:
            raise ValueError("negatives.source data needs negatives.per_query")
        if self.after_random and not self.mined:
            raise ValueError(
                "negatives.after_random is for mined hard negatives; set negatives.per_query and source mined"
            )
        return self

    @property
    def mined(self) -> int:
        """How many of them a plan must hold."""
        return self.per_query if self.source == "mined" else 0


class ReportConfig(Section):
    compare: bool = Field(False, description="also measure the paper's recipe for the report of each plan (METIS)")


class BatchConfig(Section):
    size: int = Field(gt=1, description="rows |B| of a batch, over all ranks")
    policy: Literal["b3", "b3_merged", "b3_mixed", "random", "random_mixed"] = Field(
        "b3",
        description="b3: mined communities of one data set; b3_merged: all classification sets are one; b3_mixed:"
        " communities of all; random: random rows of one data set (fair control); random_mixed: of all",
    )
    random_steps: Count | Literal["auto"] = Field(
        0,
        description="the first so many steps draw random batches of one data set, as policy random: a warm-up; auto:"
        " until the student finds the share `ready` of its targets in them, asked every 50 steps",
    )
    ready: float = Field(0.5, gt=0, le=1, description="the share, among 64 targets, at which random_steps auto ends")

    @property
    def mined(self) -> bool:
        """Whether batches are made of mined communities."""
        return self.policy.startswith("b3")


class EvalConfig(Section):
    source: str = Field(description="source line of the evaluation data, as data.source")
    split: str = "test"
    subsets: list[str] = Field(min_length=1, description="subsets to score")
    image_dir: str | None = Field(None, description="as data.image_dir")
    prefix_targets: bool = Field(True, description="as data.prefix_targets")
    every: int | None = Field(None, gt=0, description="steps between evaluations during training; null: none")
    max_rows: int | None = Field(None, gt=0, description="score only the first rows of each subset during training")


class Config(Section):
    """One recipe."""

    name: str = Field(description="name of the recipe, used in reports")
    seed: int = Field(0, ge=0, description="every random choice derives from it")
    output_dir: str = Field(description="run directory")
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: continue from the newest complete checkpoint of output_dir; never: refuse a used folder",
    )
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    mining: MiningConfig
    negatives: NegativesConfig = NegativesConfig()
    report: ReportConfig = ReportConfig()
    batch: BatchConfig
    train: TrainConfig
    eval: EvalConfig | None = None

    @property
    def needs_plan(self) -> bool:
        """Whether training reads a batch plan."""
        return self.batch.mined or self.negatives.mined > 0
