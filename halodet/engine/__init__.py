"""Configs, datasets and the trainer of a run."""

from .checkpoints import CANNOT_WRITE
from .datasets import prepare_datasets, register_user_data, register_user_data_again, user_data_files
from .distributed import agree, check_shared
from .launch import World, find_world, host_of, join, supervise
from .lifeline import EXIT_RANK_LOST
from .record import start_run
from .scaling import scale_to_batch
from .setup import ConfigError, check_weights, check_writable, find_config, load_config, with_seed
from .signals import PREEMPTED, handed_on, try_again_later
from .stop import TrainingStopped
from .trainer import Trainer

__all__ = [
    "CANNOT_WRITE",
    "EXIT_RANK_LOST",
    "ConfigError",
    "PREEMPTED",
    "Trainer",
    "TrainingStopped",
    "World",
    "agree",
    "check_shared",
    "check_weights",
    "check_writable",
    "find_config",
    "find_world",
    "handed_on",
    "host_of",
    "join",
    "load_config",
    "prepare_datasets",
    "register_user_data",
    "register_user_data_again",
    "scale_to_batch",
    "start_run",
    "supervise",
    "try_again_later",
    "user_data_files",
    "with_seed",
]
