"""Configuration: frozen sections, strict TOML, derived integers. Pure."""

from roformer_dist.config.derive import RunShape, derive
from roformer_dist.config.load import ConfigError, config_hash, dump_config, load_config, parse_config
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.rope import RopeConfig
from roformer_dist.config.schema import Config

__all__ = [
    "Config",
    "ConfigError",
    "ModelConfig",
    "RopeConfig",
    "RunShape",
    "config_hash",
    "derive",
    "dump_config",
    "load_config",
    "parse_config",
]
