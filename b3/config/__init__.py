"""A recipe: its typed tree, how a YAML file fills it, and what of it contradicts itself."""

from b3.config.load import describe_keys, dump_config, load_config
from b3.config.schema import Config, DatasetConfig

__all__ = ["Config", "DatasetConfig", "describe_keys", "dump_config", "load_config"]
