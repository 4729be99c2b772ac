"""The sections of a recipe that decide over mining. `MiningOptions` are also the arguments of `b3.mining.mine`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from b3 import registry
from b3.config.schema import DatasetConfig, Family, Section
from b3.errors import InputError

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]

AUTHORS: dict[str, Any] = {"partitioner": "paper", "edges": "mutual"}  # what preset paper says of other keys


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
    partitioner: str = Field(
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

    @field_validator("partitioner")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            return registry.check("miner", name)
        except InputError as error:
            raise ValueError(str(error)) from None

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

    @model_validator(mode="after")
    def _effective(self) -> NegativesConfig:
        if self.source == "data" and not self.per_query:
            raise ValueError("negatives.source data needs negatives.per_query")
        return self

    @property
    def mined(self) -> int:
        """How many of them a plan must hold."""
        return self.per_query if self.source == "mined" else 0


class ReportConfig(Section):
    compare: bool = Field(False, description="also measure the paper's recipe for the report of each plan (METIS)")
