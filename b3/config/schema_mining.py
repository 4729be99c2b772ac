"""The sections of a recipe that decide over mining: keys, types, defaults, and what contradicts itself within one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from b3.config.schema import DatasetConfig, Family, Section

REFINED = ("anneal",)  # partitioners that end in swaps


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
    partitioner: Literal["anneal", "paper", "kmeans", "random"] = Field(
        "anneal",
        description="anneal: swaps from random communities; paper: k-way METIS and the"
        " authors' repair; kmeans: balanced k-means, no windows",
    )
    refine_passes: int = Field(30, ge=0, description="passes of annealed swaps (anneal)")
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
        for key in ("refine_passes", "piece_rows"):
            default = type(self).model_fields[key].default  # what a written config.yaml holds is no request
            if not self.refined and getattr(self, key) not in (default, 0):
                raise ValueError(f"mining.{key} {getattr(self, key)} has no effect with partitioner {self.partitioner}")
        if self.partitioner == "paper" and self.edges != "mutual":
            raise ValueError("mining.partitioner paper needs mining.edges mutual")
        if self.edges == "mutual" and not self.veto:
            raise ValueError("mining.veto has no effect with edges mutual (which vetoes by itself)")
        return self


class NegativesConfig(Section):
    per_query: int = Field(0, ge=0, description="hard negatives h per query (B3++: 5)")
    source: Literal["mined", "data"] = Field(
        "mined", description="data: the first h that a row brings along (neg_text, neg_image_path)"
    )
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
        if self.source == "data" and not self.per_query:
            raise ValueError("negatives.source data needs negatives.per_query")
        if self.source == "data" and idle:
            raise ValueError(f"negatives.{idle[0]} is a rule of mining and has no effect with negatives.source data")
        if self.scope == "community" and "candidates" in idle:
            raise ValueError("negatives.candidates has no effect with negatives.scope community")
        limits = [name for name in ("max_relative", "max_margin") if getattr(self, name) is not None]
        if self.scope == "batch" and limits:
            raise ValueError(f"negatives.{limits[0]} needs negatives.scope community")
        return self

    @property
    def rules(self) -> dict[str, Any]:
        """The arguments of `b3.mining.negatives.NegativeRules`."""
        return self.model_dump(exclude={"per_query", "source"})

    @property
    def mined(self) -> int:
        """How many of them a plan must hold."""
        return self.per_query if self.source == "mined" else 0
