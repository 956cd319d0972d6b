"""Training and evaluation of a run."""

from halodet.config.load import find_config, load_config
from halodet.data.user_datasets import prepare_datasets, register_user_data, register_user_data_again, user_data_files
from halodet.engine.distributed import check_shared, detect_dist_env, init_distributed, run_and_broadcast_errors
from halodet.engine.preemption import PREEMPTED
from halodet.engine.run_info import start_run
from halodet.engine.trainer import Trainer
from halodet.errors import ConfigError, TrainingStopped
from halodet.solver.lr_scaling import scale_to_batch

__all__ = [
    "ConfigError",
    "PREEMPTED",
    "Trainer",
    "TrainingStopped",
    "check_shared",
    "detect_dist_env",
    "find_config",
    "init_distributed",
    "load_config",
    "prepare_datasets",
    "register_user_data",
    "register_user_data_again",
    "run_and_broadcast_errors",
    "scale_to_batch",
    "start_run",
    "user_data_files",
]
