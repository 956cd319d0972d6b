"""Configs, datasets and the trainer of a run."""

from .checkpoints import CANNOT_WRITE
from .datasets import prepare_datasets, register_user_data, register_user_data_again
from .setup import ConfigError, check_weights, check_writable, find_config, load_config, with_seed
from .signals import PREEMPTED
from .trainer import Trainer

__all__ = [
    "CANNOT_WRITE",
    "ConfigError",
    "PREEMPTED",
    "Trainer",
    "check_weights",
    "check_writable",
    "find_config",
    "load_config",
    "prepare_datasets",
    "register_user_data",
    "register_user_data_again",
    "with_seed",
]
