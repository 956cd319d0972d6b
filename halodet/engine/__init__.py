"""Configs, datasets and the trainer of a run."""

from .datasets import prepare_datasets, register_user_data, register_user_data_again
from .setup import ConfigError, check_weights, check_writable, find_config, load_config
from .stop import TrainingStopped
from .trainer import Trainer

__all__ = [
    "ConfigError",
    "Trainer",
    "TrainingStopped",
    "check_weights",
    "check_writable",
    "find_config",
    "load_config",
    "prepare_datasets",
    "register_user_data",
    "register_user_data_again",
]
