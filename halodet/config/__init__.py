"""Config keys, loading of config files and validation of values."""

from .defaults import add_halodet_config, config_dir

__all__ = ["add_halodet_config", "config_dir"]
