"""A recipe: its typed tree, how a YAML file fills it, and what of it contradicts itself."""

from b3.config.load import Config, describe_keys, dump_config, load_config
from b3.config.schema import DatasetConfig
from b3.config.schema_mining import MiningConfig
from b3.config.yaml_tree import merge

__all__ = ["Config", "DatasetConfig", "MiningConfig", "describe_keys", "dump_config", "load_config", "merge"]
