"""Config keys, loading of config files and validation of values."""

from .defaults import add_halodet_config, config_dir
from .load import find_config, load_config
from .validate import validate

__all__ = ["add_halodet_config", "config_dir", "find_config", "load_config", "validate"]
