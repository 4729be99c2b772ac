"""The typed tree of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from b3.config.schema import AdapterConfig, BatchConfig, DataConfig, EvalConfig, ModelConfig, Section, TrainConfig
from b3.config.schema_mining import MiningConfig, NegativesConfig, ReportConfig


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
