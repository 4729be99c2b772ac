"""What contradicts itself between the sections of a recipe: all that would silently change a result."""

from __future__ import annotations

from b3.config.schema import Config
from b3.errors import ConfigError


def check(config: Config) -> None:
    """Raise `ConfigError` with one line on the first contradiction."""
    model, train = config.model, config.train
    if model.shard and config.eval is not None and config.eval.every is not None:
        raise ConfigError("eval.every does not work with model.shard (ranks encode unequal shares); leave one out")
    if config.negatives.source == "data" and train.teacher_keys:
        raise ConfigError(
            f"{train.teacher_keys[0]} needs the teacher's vectors of all targets, and there are none of those that"
            " negatives.source data brings; leave one out"
        )
    closed = [entry.subset for entry in config.data.datasets if entry.closed]
    if closed and config.negatives.source != "data":
        raise ConfigError(
            f"data set {closed[0]} is closed: its rows' only negatives are those that they bring; set"
            " negatives.source=data and negatives.per_query"
        )
    if isinstance(train.temperature, dict):
        lacking = sorted({entry.family for entry in config.data.datasets} - set(train.temperature))
        if lacking:
            raise ConfigError(f"train.temperature has none for family {lacking[0]}, which a data set has; add it")
    if model.train == "full" and model.shard:
        raise ConfigError("model.shard spreads frozen weights, and model.train full has none; leave one out")
    if model.quantize and model.compile is True:
        raise ConfigError("model.compile true does not go with model.quantize: layers in 4 bit run as they are")
    if model.quantize and (model.train == "full" or model.shard):
        other = "model.train full" if model.train == "full" else "model.shard"
        raise ConfigError(f"model.quantize is for frozen weights that each rank holds, not for {other}; leave one out")
    low, high = model.min_pixels, model.max_pixels
    if low is not None and high is not None and low > high:
        raise ConfigError(f"model.min_pixels {low} exceeds model.max_pixels {high}")
    batch, entries = config.batch, config.data.datasets
    if batch.policy != "random" and batch.random_steps != "auto" and batch.random_steps > train.steps:
        raise ConfigError(f"batch.random_steps {batch.random_steps} exceeds train.steps {train.steps}")
    if config.negatives.after_random and (batch.policy == "random" or batch.random_steps == 0):
        raise ConfigError(
            f"negatives.after_random needs batch.random_steps and another policy than random (policy {batch.policy},"
            f" random_steps {batch.random_steps}); set both, or leave it out"
        )
    num_labelled = sum(entry.family == "classification" for entry in entries)
    if batch.policy == "b3_merged" and num_labelled < 2:
        raise ConfigError(
            "batch.policy b3_merged merges data sets of family classification, and the recipe has"
            f" {num_labelled}; use policy b3"
        )
    if batch.policy == "b3_mixed" and len(entries) < 2:
        raise ConfigError("batch.policy b3_mixed mixes data sets, and the recipe has one; use policy b3")
    k = config.mining.community_size
    if batch.mined and batch.size % k:
        lower = max(k, batch.size // k * k)
        raise ConfigError(f"batch.size {batch.size} is not a multiple of mining.k {k}; use {lower} or {lower + k}")
