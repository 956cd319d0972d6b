"""Two processes exchange something again and again until one of them ends; see test_launch.py."""

import argparse
import atexit
import os
import signal
import sys
import time
from datetime import timedelta

from halodet.engine import detect_dist_env, join, supervise
from halodet.errors import ConfigError

import torch
import torch.distributed as dist
from detectron2.utils.logger import setup_logger


def main():
    how, who = sys.argv[1], int(sys.argv[2])
    world = detect_dist_env(argparse.Namespace(num_gpus=1, num_machines=1, machine_rank=0))
    setup_logger(distributed_rank=world.rank, name="halodet")
    join(world, "cpu", timedelta(minutes=10))

    def work():
        for step in range(400):
            if how == "both" and step == 100:
                time.sleep(
                    0 if world.rank == who else 1.5
                )  # the other finds the mistake when it has been told of it already
                raise ConfigError("set it to 3")
            if how == "leave" and step == 100:
                atexit.register(time.sleep, 0 if world.rank == who else 3)  # Python takes its time to end, too
                raise SystemExit(75)
            if world.rank == who and step == 100 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                print(f"ending at {time.time()}", flush=True)
                if how == "bug":
                    raise KeyError("a thing")
                if how == "mistake":
                    raise ConfigError("set it to 3")
                if how == "exit":
                    os._exit(9)
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600)  # stopped: the other is left waiting, and is ended by hand
            dist.all_reduce(torch.ones(3))
        print("done", flush=True)

    return supervise(work, world.host, {ConfigError: 2})


if __name__ == "__main__":
    sys.exit(main())
