"""The typed tree that a YAML file fills.

    config = load_config("configs/demo.yaml", ["train.steps=20", "batch.policy=random"])

A file may start from another one with ``base: other.yaml``. An unknown key, a wrong type or values that contradict each
other raise `ConfigError`: one line with the file, the line, the key and the nearest known key. Nothing heavy is
imported here, so a mistake shows at once.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from b3.config_batches import check_batches
from b3.config_mining import check_classification
from b3.config_yaml import apply_override, locate, merge, read_yaml
from b3.errors import ConfigError

__all__ = ["BASE", "Config", "DatasetConfig", "MiningConfig", "describe_keys", "dump_config", "load_config", "merge"]

Family = Literal["retrieval", "classification", "vqa", "grounding"]
BASE = "base"  # name of the plans of the `mining` section itself, beside its variants


class Section(BaseModel):
    """A part of the tree: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    name: str = Field(description="hub name or folder of the backbone (or of an adapter repository)")
    init_adapter: str | None = Field(None, description="adapter to continue from; its shape must be that of `adapter`")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights; auto: bfloat16 on GPU"
    )
    attention: Literal["auto", "flash_attention_2", "sdpa"] = Field("auto", description="attention kernel")
    min_pixels: int = Field(3136, gt=0, description="smallest picture after resizing, pixels")
    max_pixels: int = Field(1003520, gt=0, description="largest picture after resizing, pixels (28*28 a token)")
    max_length: int | None = Field(None, gt=0, description="cut text-only items to this many tokens")
    positions: Literal["1d", "mrope"] = Field("1d", description="rotary positions; 1d as all B3 and VLM2Vec models")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    shard: bool = Field(False, description="spread the decoder layers' frozen weights over the ranks (FSDP2)")
    train: Literal["adapter", "full"] = Field("adapter", description="full: all weights, in float32, without adapter")
    freeze: list[str] = Field([], description="regular expressions; parameters whose name one of them finds stay fixed")

    @model_validator(mode="after")
    def _full(self) -> ModelConfig:
        if self.train == "full" and self.init_adapter is not None:
            raise ValueError(
                "model.init_adapter has no effect with model.train full; name an adapter repository instead"
            )
        if self.train == "full" and self.dtype == "bfloat16":
            raise ValueError("model.dtype bfloat16 has no effect with model.train full; use float32 and train.bf16")
        return self


class AdapterConfig(Section):
    r: int = Field(8, gt=0, description="rank")
    alpha: int = Field(64, gt=0, description="scale is alpha / r")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the adapter's input")
    use_dora: bool = Field(True, description="weight-decomposed (DoRA), as the released models")
    init: Literal["gaussian", "kaiming"] = Field("gaussian", description="of the A matrices")
    target_modules: str | list[str] | None = Field(
        None,
        description="regular expression or suffixes of linear layers; null: the paper's (language model q k v o down)",
    )


class DatasetConfig(Section):
    subset: str = Field(description="name of the subset: hub configuration, folder or file stem")
    family: Family = Field("retrieval", description="decides the rank window's default p")
    source: str | None = Field(None, description="overrides data.source")
    split: str | None = Field(None, description="overrides data.split")
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


class DataConfig(Section):
    source: str = Field(description="embedded:NAME, hub:OWNER/NAME, parquet:PATH or jsonl:PATH")
    split: str = Field("train", description="'original' or 'diverse_instruction' in MMEB-train")
    image_dir: str | None = Field(None, description="folder (or .parquet) of the images; embedded data brings its own")
    prefix_targets: bool = Field(True, description="put the paper's prefixes before text-only targets")
    bad_images: Literal["fail", "replace"] = Field(
        "fail", description="a row whose picture cannot be read ends the run, or gives its place to another row"
    )
    max_bad_images: int = Field(100, gt=0, description="rows that may be replaced in a run (with bad_images replace)")
    datasets: list[DatasetConfig] = Field(min_length=1, description="the data sets to train on")

    @model_validator(mode="after")
    def _cap(self) -> DataConfig:
        if self.bad_images == "fail" and self.max_bad_images != 100:
            raise ValueError(f"data.max_bad_images {self.max_bad_images} has no effect without data.bad_images replace")
        return self

    @model_validator(mode="after")
    def _unique(self) -> DataConfig:
        names = [d.subset for d in self.datasets]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"subset(s) {', '.join(twice)} listed twice")
        return self


REFINED = ("anneal", "metis")  # partitioners that end in swaps


class MiningVariant(Section):
    """Other plans of the same data: what is given here replaces the key of `mining`."""

    p: int | dict[Family, int] | None = Field(None, description="replaces mining.p; a data set's own p stays")
    m: int | None = Field(None, gt=0, description="replaces mining.m; a data set's own m stays")
    k: int | None = Field(None, gt=0, description="replaces mining.k")
    edges: str | None = Field(None, description="replaces mining.edges")
    veto: bool | None = Field(None, description="replaces mining.veto")
    partitioner: str | None = Field(None, description="replaces mining.partitioner")
    penalty: int | None = Field(None, description="replaces mining.penalty")

    @property
    def replaced(self) -> dict[str, Any]:
        """The keys that are given."""
        return self.model_dump(exclude_none=True)


class MiningConfig(Section):
    dir: str = Field(description="folder of the batch plans, one sub-folder a data set")
    teacher: str = Field(
        description="'embedded', a checkpoint, st:NAME (sentence-transformers), or a folder of SUBSET_queries.npy and"
        " SUBSET_targets.npy"
    )
    teacher_adapter: str | None = Field(None, description="adapter of a teacher checkpoint")
    p: int | dict[Family, int] = Field(30, description="ranks skipped at the top; a number or one a family")
    m: int = Field(100, gt=0, description="width of the rank window [p, p+m)")
    k: int = Field(32, gt=0, description="community size K")
    edges: Literal["union", "mutual"] = Field("union", description="when two rows are linked; mutual is the paper's")
    veto: bool = Field(True, description="drop an edge if either row ranks the other above p (union only)")
    penalty: int = Field(
        0, ge=0, le=60, description="cost of two rows in one community of which one ranks the other above its window"
    )
    max_similarity: float | None = Field(
        None, description="targets of the window that the teacher scores above this count as ranked above it"
    )
    max_relative: float | None = Field(
        None, gt=0, description="as max_similarity, as a share of the positive's score (NV-Retriever: 0.95)"
    )
    partitioner: Literal["anneal", "metis", "paper", "kmeans", "random"] = Field(
        "anneal",
        description="anneal: swaps from random communities; metis: swaps from METIS; paper: k-way METIS and the"
        " authors' repair; kmeans: balanced k-means, no windows",
    )
    refine_passes: int = Field(30, ge=0, description="passes of annealed swaps (anneal and metis)")
    piece_rows: int | None = Field(
        None, gt=1, description="cut larger data sets into pieces of at most so many rows first, by balanced k-means"
    )
    search: Literal["exact", "ivf"] = Field("exact", description="ivf: approximate ranking, for millions of rows")
    target_unit: Literal["distinct", "label30"] = Field(
        "distinct", description="classification sets; label30: edges to the first 30 % of labels, as the authors' code"
    )
    classification_subset: int | None = Field(
        None, gt=0, description="mine classification sets in random subsets of so many rows; the authors: 10000"
    )
    variants: dict[str, MiningVariant] = Field(
        {}, description="further plans by name, for batch.schedule; hard negatives stay those of mining itself"
    )

    def variant(self, name: str) -> MiningConfig:
        """The section with a variant's keys in place. Raises `ValueError` where they do not fit together."""
        replaced = self.variants[name].replaced
        kept = self.model_dump(exclude_unset=True, exclude={"variants"})
        if replaced.get("partitioner", "anneal") not in REFINED:
            for key in ("refine_passes", "penalty", "piece_rows"):
                kept.pop(key, None)  # meant for the section's own partitioner
        if replaced.get("edges", "union") != "union":
            kept.pop("veto", None)
        return MiningConfig.model_validate({**kept, **replaced})

    @property
    def refined(self) -> bool:
        """Whether swaps refine the communities."""
        return self.partitioner in REFINED

    def p_of(self, dataset: DatasetConfig) -> int:
        """Ranks to skip for a data set."""
        if dataset.p is not None:
            return dataset.p
        return self.p if isinstance(self.p, int) else self.p.get(dataset.family, 30)

    @model_validator(mode="after")
    def _faithful(self) -> MiningConfig:
        values = [self.p] if isinstance(self.p, int) else list(self.p.values())
        if min(values, default=0) < 0:
            raise ValueError(f"mining.p {self.p} must not be negative")
        for key in ("refine_passes", "penalty", "piece_rows"):
            default = type(self).model_fields[key].default  # what a written config.yaml holds is no request
            if not self.refined and getattr(self, key) not in (default, 0):
                raise ValueError(f"mining.{key} {getattr(self, key)} has no effect with partitioner {self.partitioner}")
        if self.penalty and (self.edges != "union" or not self.veto):
            raise ValueError(f"mining.penalty {self.penalty} needs edges union with the veto")
        if self.partitioner == "paper" and self.edges != "mutual":
            raise ValueError("mining.partitioner paper needs mining.edges mutual")
        if self.edges == "mutual" and not self.veto:
            raise ValueError("mining.veto has no effect with edges mutual (which vetoes by itself)")
        return self


class NegativesConfig(Section):
    per_query: int = Field(0, ge=0, description="mined hard negatives h per query (B3++: 5)")
    scope: Literal["community", "batch"] = Field(
        "community", description="drawn for each community when mining, or for each batch when it is composed"
    )
    window: int | None = Field(None, gt=0, description="counted ranks [p, p+window); null: m. The authors' code: 100")
    penalty: float = Field(1.0, ge=0, allow_inf_nan=False, description="taken from a target's score by each top p")
    filter: Literal["all", "none"] = Field("all", description="all: never of the owner's top p; none: authors' code")
    drop_member_labels: bool = Field(True, description="never a target of any member; the authors' code: false")
    repeat: bool = Field(False, description="repeat candidates where they are short, as the authors' code")
    max_relative: float | None = Field(None, ge=0, le=1, description="most share of the positive's score")
    max_margin: float | None = Field(None, ge=0, le=2, description="least distance below the positive's score")
    candidates: int = Field(512, gt=0, description="targets kept for each community (scope batch only)")

    @model_validator(mode="after")
    def _effective(self) -> NegativesConfig:
        defaults = type(self).model_fields
        idle = [name for name in self.rules if getattr(self, name) != defaults[name].default]
        if not self.per_query and idle:
            raise ValueError(f"negatives.{idle[0]} has no effect with negatives.per_query 0")
        if self.scope == "community" and "candidates" in idle:
            raise ValueError("negatives.candidates has no effect with negatives.scope community")
        limits = [name for name in ("max_relative", "max_margin") if getattr(self, name) is not None]
        if self.scope == "batch" and limits:
            raise ValueError(f"negatives.{limits[0]} needs negatives.scope community")
        return self

    @property
    def rules(self) -> dict[str, Any]:
        """The arguments of `b3.mining.negatives.NegativeRules`."""
        return self.model_dump(exclude={"per_query"})


class PhaseConfig(Section):
    until: float = Field(gt=0, le=1, description="share of train.steps after which the phase ends; the last has 1.0")
    plans: dict[str, float] = Field(
        min_length=1, description="share of the batches by plan: base or a name of mining.variants; they sum to 1"
    )


class BatchConfig(Section):
    size: int = Field(gt=1, description="rows |B| of a batch, over all ranks")
    policy: Literal["b3", "b3_merged", "b3_mixed", "random", "random_mixed"] = Field(
        "b3",
        description="b3: mined communities of one data set; b3_merged: all classification sets are one; b3_mixed:"
        " communities of all; random: random rows of one data set (fair control); random_mixed: of all",
    )
    random_share: float = Field(
        0.0, ge=0, lt=1, description="share of each batch drawn at random instead of in communities (b3 policies)"
    )
    remix: Literal["epoch", "frozen"] = Field(
        "epoch", description="frozen: batches of the first epoch throughout, in a new order, as the authors' sampler"
    )
    schedule: list[PhaseConfig] = Field([], description="phases of training that mix plans; empty: base throughout")

    @property
    def mined(self) -> bool:
        """Whether batches are made of mined communities."""
        return self.policy.startswith("b3")


class TrainConfig(Section):
    steps: int = Field(gt=0, description="optimiser steps")
    lr: float = Field(1e-4, gt=0, description="peak learning rate (AdamW)")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: none")
    temperature: float = Field(0.02, gt=0, description="of InfoNCE")
    learn_temperature: bool = Field(False, description="train log(1 / temperature), as CLIP; needs temperature >= 0.01")
    symmetric: bool = Field(False, description="mean of query to target and target to query, as CLIP")
    mask: Literal["none", "duplicates"] = Field(
        "duplicates",
        description="duplicates: a target equal to the positive, or belonging to an equal query, is no negative",
    )
    mask_margin: float | None = Field(
        None,
        ge=0,
        description="a target scored above the positive by more than this cosine is no negative; Qwen3-Embedding: 0.1",
    )
    mask_teacher_margin: float | None = Field(
        None,
        ge=0,
        description="a target whose teacher score exceeds the positive's less this is no negative; GISTEmbed: 0",
    )
    hardness_weight: float = Field(0.0, ge=0, description="beta: a negative weighs exp(beta cosine); LLaVE: 9; 0: off")
    chunk_tokens: int = Field(8192, gt=0, description="tokens of one forward pass; bounds memory at any batch size")
    vision_cache_mib: int = Field(
        4096, ge=0, description="picture features kept between the two passes if the vision tower is frozen; 0: none"
    )
    share_duplicates: Literal["auto", "always", "never"] = Field(
        "auto",
        description="encode equal items of a rank once; auto: if adapter.dropout is 0 (else they share a dropout mask)",
    )
    bf16: bool = Field(False, description="bfloat16 autocast")
    workers: int = Field(0, ge=0, description="processes that decode and tokenise ahead of the step")
    log_every: int = Field(1, gt=0, description="steps between lines of metrics.jsonl")
    save_every: int = Field(500, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints that are kept")
    save_merged: bool = Field(
        False, description="also write OUTPUT/merged: the backbone with the adapter in its weights"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="report to these beside metrics.jsonl (pip install 'b3[trackers]')"
    )
    timeout_minutes: float = Field(30.0, gt=0, description="a rank that waits longer for the others ends the run")

    @model_validator(mode="after")
    def _warmup(self) -> TrainConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(f"train.warmup_steps {self.warmup_steps} exceeds train.steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _temperature(self) -> TrainConfig:
        if self.learn_temperature and self.temperature < 0.01:
            raise ValueError(
                f"train.temperature {self.temperature} is below 0.01, the least that train.learn_temperature allows"
            )
        return self


class EvalConfig(Section):
    source: str = Field(description="source line of the evaluation data, as data.source")
    split: str = "test"
    subsets: list[str] = Field(min_length=1, description="subsets to score")
    image_dir: str | None = None
    prefix_targets: bool = Field(True, description="as --tgt_prefix_mod")
    every: int | None = Field(None, gt=0, description="steps between evaluations during training; null: none")
    max_rows: int | None = Field(None, gt=0, description="score only the first rows of each subset during training")

    @model_validator(mode="after")
    def _rows(self) -> EvalConfig:
        if self.max_rows is not None and self.every is None:
            raise ValueError(f"eval.max_rows {self.max_rows} has no effect without eval.every")
        return self


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
    batch: BatchConfig
    train: TrainConfig
    eval: EvalConfig | None = None

    @model_validator(mode="after")
    def _across(self) -> Config:
        if self.model.shard and self.eval is not None and self.eval.every is not None:
            raise ValueError("eval.every does not work with model.shard (ranks encode unequal shares); leave one out")
        if self.model.train == "full" and self.adapter.model_fields_set:
            key = sorted(self.adapter.model_fields_set)[0]
            raise ValueError(f"adapter.{key} has no effect with model.train full; remove the section adapter")
        if self.model.train == "full" and self.model.shard:
            raise ValueError("model.shard spreads frozen weights, and model.train full has none; leave one out")
        if self.model.min_pixels > self.model.max_pixels:
            raise ValueError(
                f"model.min_pixels {self.model.min_pixels} exceeds model.max_pixels {self.model.max_pixels}"
            )
        check_batches(self)
        check_classification(self)
        return self

    @property
    def needs_plan(self) -> bool:
        """Whether training reads a batch plan."""
        return bool(self.mined_plans)

    @property
    def batch_plans(self) -> list[str]:
        """Names of the plans that batches are drawn from, `base` and variants; none for random batches."""
        if not self.batch.mined:
            return []
        return list(dict.fromkeys(name for phase in self.batch.schedule for name in phase.plans)) or [BASE]

    @property
    def mined_plans(self) -> list[str]:
        """Names of the plans that training reads; hard negatives come from `base`."""
        needed = {*self.batch_plans, *([BASE] if self.negatives.per_query else [])}
        return [name for name in (BASE, *self.mining.variants) if name in needed]

    def mining_of(self, plan: str) -> MiningConfig:
        """The mining section of a plan."""
        return self.mining if plan == BASE else self.mining.variant(plan)

    def phases(self) -> list[tuple[int, dict[str, float]]] | None:
        """(step after which it ends, share of batches by plan) of each phase of the schedule, or None without one."""
        steps = self.train.steps
        return [(round(phase.until * steps), phase.plans) for phase in self.batch.schedule] or None


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """Keys of the section that holds `path`."""
    section: Any = Config
    named = False  # whether the next part is a name that the user chose
    for part in path:
        if isinstance(part, int) or named:
            named = False
            continue
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        if field is None:
            break
        section, named = _section_of(field.annotation), _is_table(field.annotation)
    return sorted(section.model_fields) if hasattr(section, "model_fields") else []


def _section_of(annotation: Any) -> Any:
    """The section class inside an annotation such as `list[DatasetConfig]` or `EvalConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None


def _is_table(annotation: Any) -> bool:
    """Whether a field holds sections by a name of the user's choice."""
    return get_origin(annotation) is dict and _section_of(annotation) is not None


def _real_path(location: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pydantic's location without the names of union members that it appends to a leaf."""
    section: Any = Config
    named = False
    for index, part in enumerate(location):
        if isinstance(part, int) or named:
            named = False
            continue
        field = section.model_fields.get(part)
        inner = None if field is None else _section_of(field.annotation)
        if field is None or inner is None:
            return location[: index + 1]
        section, named = inner, _is_table(field.annotation)
    return location


def _explain(error: ValidationError, path: Path, overrides: list[str]) -> str:
    """One line for the first problem that pydantic found."""
    first = error.errors()[0]
    location = _real_path(first["loc"])
    key = ".".join(str(part) for part in location)
    where = str(path)
    from_override = next((o for o in overrides if key and o.partition("=")[0] == key), None)
    if from_override:
        where = f"override '{from_override}'"
    else:
        line = locate(yaml.compose(path.read_text()), location)
        where += f":{line}" if line else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key '{key}'; {hint}"
    if first["type"] == "missing":
        return f"{where}: key '{key}' is required"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"{where}: {message}"
    if first["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: '{key}' = {first['input']!r}: {message[0].lower()}{message[1:]}"


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe. Raises `ConfigError` with one line on the first problem."""
    path, overrides = Path(path), list(overrides or [])
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, overrides)) from None


def describe_keys() -> str:
    """All keys with type, default and meaning, one a line; shown by ``train.py --help``."""
    lines: list[str] = []

    def walk(section: type[Section], prefix: str) -> None:
        for name, field in section.model_fields.items():
            inner = _section_of(field.annotation)
            if inner is not None:
                element = "N." if "list[" in str(field.annotation).lower() else ""
                walk(inner, f"{prefix}{name}." + ("NAME." if _is_table(field.annotation) else element))
                continue
            kind = getattr(field.annotation, "__name__", None) if "[" not in str(field.annotation) else None
            text = kind or str(field.annotation).replace("typing.", "").replace("NoneType", "null")
            default = "required" if field.is_required() else f"default {field.default}"
            note = f"  {field.description}" if field.description else ""
            lines.append(f"  {prefix}{name} ({text}; {default}){note}")

    walk(Config, "")
    return "\n".join(lines)


def dump_config(config: Config) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
