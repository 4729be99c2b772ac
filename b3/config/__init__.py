"""A recipe: its typed tree, how a YAML file fills it, and what of it contradicts itself."""

from b3.config.load import describe_keys, dump_config, load_config, merge
from b3.config.recipe import Config
from b3.config.schema import DatasetConfig
from b3.config.schema_mining import MiningConfig

__all__ = ["Config", "DatasetConfig", "MiningConfig", "describe_keys", "dump_config", "load_config", "merge"]
