"""Configs, datasets and the trainer of a run."""

from .datasets import prepare_datasets, register_user_data, register_user_data_again
from .record import start_run
from .scaling import scale_to_batch
from .setup import ConfigError, check_weights, check_writable, find_config, load_config
from .trainer import Trainer

__all__ = [
    "ConfigError",
    "Trainer",
    "check_weights",
    "check_writable",
    "find_config",
    "load_config",
    "prepare_datasets",
    "register_user_data",
    "register_user_data_again",
    "scale_to_batch",
    "start_run",
]
