"""The section `train` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from b3.config.section import Section, entry

Family = Literal["retrieval", "classification", "vqa", "grounding"]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Direction = Literal["qt", "qq", "tt", "tq"]


class DistillConfig(Section):
    weight: float = Field(
        0.5, gt=0, le=1, description="w of (1 - w) InfoNCE + w (two-way KL / 2); see losses/distill.py"
    )
    temperature: float = Field(0.02, gt=0, description="of the teacher's and the student's cosines in the KL")


class TrainConfig(Section):
    steps: int = Field(gt=0, description="optimiser steps")
    lr: float = Field(1e-4, gt=0, description="peak learning rate (AdamW)")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="not of norms, biases and a learned temperature")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: none")
    loss: Annotated[str, entry("loss")] = Field("info_nce", description="an entry of b3.registry.LOSSES")
    temperature: Temperature | dict[Family, Temperature] = Field(
        0.02, description="of InfoNCE; a number, or one for each family of the data sets"
    )
    learn_temperature: bool = Field(False, description="train log(1 / temperature), as CLIP; needs temperature >= 0.01")
    symmetric: bool = Field(False, description="mean of query to target and target to query, as CLIP")
    directions: list[Direction] = Field(
        ["qt"],
        description="what stands in the sum of a query's loss: qt, targets; qq, its cosines with other queries; tt,"
        " those of its target with other targets; tq, those of its target with queries. GTE: all four",
    )
    mask_margin: float | None = Field(
        None,
        ge=0,
        description="a target scored above the positive by more than this cosine is no negative; Qwen3-Embedding: 0.1",
    )
    mask_teacher_margin: float | None = Field(
        None,
        ge=0,
        description="a target whose teacher score exceeds the positive's minus this is no negative; GISTEmbed: 0",
    )
    matryoshka: list[int] | dict[int, float] | None = Field(
        None,
        description="lengths to which vectors may be cut later: the loss of each is added, with weight 1 or that of a"
        " mapping length: weight; the whole length always counts, with weight 1 unless it is listed",
    )
    distill: DistillConfig | None = Field(
        None, description="also draw the student's scores of a batch to those of mining.teacher, both ways"
    )
    chunk_tokens: int = Field(8192, gt=0, description="tokens of one forward pass; bounds memory at any batch size")
    kept_chunks: int = Field(
        1, gt=0, description="chunks of a step that are embedded once, not twice; each needs the memory of a chunk"
    )
    vision_cache_mib: int = Field(
        4096, ge=0, description="image features kept between the two passes if the vision tower is frozen; 0: none"
    )
    share_duplicates: Literal["auto", "always", "never"] = Field(
        "auto",
        description="encode equal items of a rank once; auto: only without dropout (else they share a dropout mask)",
    )
    bf16: bool = Field(False, description="bfloat16 autocast")
    workers: int = Field(
        0, ge=0, description="processes that decode and tokenise ahead of the step, and of the teacher"
    )
    log_every: int = Field(1, gt=0, description="steps between lines of metrics.jsonl")
    save_every: int = Field(500, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints that are kept")
    save_merged: bool = Field(
        False, description="also write OUTPUT/merged: the backbone with the adapter in its weights"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]] = Field(
        [], description="also report to these (pip install 'b3[trackers]')"
    )
    timeout_minutes: float = Field(
        30.0, gt=0, description="a rank that waits longer than this for the others ends the run"
    )

    @property
    def teacher_keys(self) -> list[str]:
        """The keys set that read the teacher's vectors in each step."""
        return [f"train.{key}" for key in ("mask_teacher_margin", "distill") if getattr(self, key) is not None]

    @property
    def lengths(self) -> dict[int, float]:
        """Weights of the lengths in `matryoshka`; empty: the whole vectors alone."""
        given = self.matryoshka or {}
        return given if isinstance(given, dict) else dict.fromkeys(given, 1.0)

    @model_validator(mode="after")
    def _lengths(self) -> TrainConfig:
        bad = [n for n, weight in self.lengths.items() if n < 1 or not 0 < weight < float("inf")]
        if self.matryoshka is not None and (bad or not self.lengths or len(self.lengths) != len(self.matryoshka)):
            raise ValueError(
                f"train.matryoshka {self.matryoshka} must be different lengths of at least 1, their weights above 0"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(f"train.warmup_steps {self.warmup_steps} exceeds train.steps {self.steps}")
        if "qt" not in self.directions or len(set(self.directions)) != len(self.directions):
            raise ValueError(f"train.directions {self.directions} must hold qt, and each direction once")
        if self.symmetric and self.directions != ["qt"]:
            raise ValueError(
                "train.symmetric takes the mean of two sums and train.directions one sum of all; leave one out"
            )
        if self.learn_temperature:
            if isinstance(self.temperature, dict):
                raise ValueError(
                    "train.learn_temperature learns one number, not one per family; give train.temperature one"
                )
            if self.temperature < 0.01:
                raise ValueError(
                    f"train.temperature {self.temperature} is below 0.01, the least that train.learn_temperature allows"
                )
        return self
