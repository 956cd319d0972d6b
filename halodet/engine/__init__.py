"""Configs, datasets and the trainer of a run."""

from halodet.config.load import check_weights, check_writable, find_config, load_config, with_seed
from halodet.data.user_datasets import prepare_datasets, register_user_data, register_user_data_again, user_data_files
from halodet.engine.checkpoint_hook import CANNOT_WRITE
from halodet.engine.distributed import agree, check_shared
from halodet.engine.launch import DistEnv, detect_dist_env, host_of, join, supervise
from halodet.engine.lifeline import EXIT_RANK_LOST
from halodet.engine.preemption import PREEMPTED, exit_on_preemption, handed_on
from halodet.engine.run_info import start_run
from halodet.engine.trainer import Trainer
from halodet.errors import ConfigError, TrainingStopped
from halodet.solver.lr_scaling import scale_to_batch

__all__ = [
    "CANNOT_WRITE",
    "EXIT_RANK_LOST",
    "ConfigError",
    "PREEMPTED",
    "Trainer",
    "TrainingStopped",
    "DistEnv",
    "agree",
    "check_shared",
    "check_weights",
    "check_writable",
    "find_config",
    "detect_dist_env",
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
    "exit_on_preemption",
    "user_data_files",
    "with_seed",
]
