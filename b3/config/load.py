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
from pydantic import Field, ValidationError, model_validator

from b3.config.checks import check_batches
from b3.config.schema import (
    AdapterConfig,
    BatchConfig,
    DataConfig,
    DatasetConfig,
    EvalConfig,
    ModelConfig,
    Section,
    TrainConfig,
)
from b3.config.schema_mining import MiningConfig, NegativesConfig, ReportConfig
from b3.config.yaml_tree import apply_override, locate, merge, read_yaml
from b3.errors import ConfigError

__all__ = ["Config", "DatasetConfig", "MiningConfig", "describe_keys", "dump_config", "load_config", "merge"]


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

    @model_validator(mode="after")
    def _across(self) -> Config:
        if self.model.shard and self.eval is not None and self.eval.every is not None:
            raise ValueError("eval.every does not work with model.shard (ranks encode unequal shares); leave one out")
        if self.negatives.source == "data" and self.train.mask_teacher_margin is not None:
            raise ValueError(
                "train.mask_teacher_margin needs the teacher's vectors of all targets, and there are none of those that"
                " negatives.source data brings; leave one out"
            )
        if self.model.train == "full" and self.train.save_merged:
            raise ValueError("train.save_merged has no effect with model.train full, without adapter; leave it out")
        changed = self.adapter.changed()
        if self.model.train == "full" and changed:
            key = changed[0]
            raise ValueError(f"adapter.{key} has no effect with model.train full; remove the section adapter")
        if self.model.train == "full" and self.model.shard:
            raise ValueError("model.shard spreads frozen weights, and model.train full has none; leave one out")
        if self.model.min_pixels > self.model.max_pixels:
            raise ValueError(
                f"model.min_pixels {self.model.min_pixels} exceeds model.max_pixels {self.model.max_pixels}"
            )
        check_batches(self)
        return self

    @property
    def needs_plan(self) -> bool:
        """Whether training reads a batch plan."""
        return self.batch.mined or self.negatives.mined > 0


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
