#!/usr/bin/env python3
"""Images per second of the data loader alone and of whole training steps, of several configs side by side: whether data keeps up.

    python tools/benchmark_data.py --config-file mask_rcnn_halo_h4 mask_rcnn_r50 --batch 2 --workers 2
    python tools/benchmark_data.py --config-file mask_rcnn_halo_h4 --batch 16 --opts INPUT.LSJ.ENABLED True INPUT.COPY_PASTE.ENABLED True

Each config's own dataset, augmentations, model and optimizer are used, with random weights and a learning rate of 0. A step is loading a
batch, forward, backward and the optimizer's step. Configs run in turns, so that what disturbs the machine disturbs all of them; figures are
medians over rounds. Workers load ahead while a model computes: the loader alone has nothing to wait for, and is timed on a loader of its
own, after what it had loaded ahead is used up. SyncBN, which needs several processes, is BN here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halodet.engine import Trainer, load_config, prepare_datasets
from halodet.errors import ConfigError, DatasetError
from halodet.utils.io import write_json

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tabulate import tabulate

_FIGURES = ("loader", "step", "waiting")


class Contender:
    """A config's loader and model; each call gives seconds.

    Args:
        cfg: the config.
        batches: batches one timing of the loader takes.
    """

    def __init__(self, cfg: CfgNode, batches: int) -> None:
        self.batches = batches
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.model = Trainer.build_model(cfg).train()
        self.optimizer = Trainer.build_optimizer(cfg, self.model)
        self._alone, self._feeding = (iter(Trainer.build_train_loader(cfg)) for _ in range(2))
        self._ahead = 2 * cfg.DATALOADER.NUM_WORKERS + 1  # batches that workers may hold ready

    def loader(self) -> float:
        """Seconds a batch takes when nothing else is done."""
        for _ in range(self._ahead):
            next(self._alone)
        start = time.perf_counter()
        for _ in range(self.batches):
            next(self._alone)
        return (time.perf_counter() - start) / self.batches

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and those of them in which it waited for its batch."""
        self._synchronize()
        start = time.perf_counter()
        batch = next(self._feeding)
        waited = time.perf_counter() - start
        self.optimizer.zero_grad()
        sum(self.model(batch).values()).backward()
        self.optimizer.step()
        self._synchronize()
        return time.perf_counter() - start, waited

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", nargs="+", default=["mask_rcnn_halo_h4", "mask_rcnn_r50"], metavar="FILE", help="configs"
    )
    parser.add_argument("--batch", type=int, default=2, help="images (2)")
    parser.add_argument("--workers", type=int, default=2, help="processes that load data for each config (2)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each (5)")
    parser.add_argument("--batches", type=int, default=4, help="batches one timing of the loader takes (4)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write every timing to this json")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for all configs")
    args = parser.parse_args(argv)
    if min(args.batch, args.rounds, args.batches) < 1 or args.workers < 0:
        parser.error("--batch, --rounds and --batches must be at least 1, --workers at least 0")
    return args


def config(name: str, args: argparse.Namespace) -> CfgNode:
    """The config as it is timed."""
    own = ["SOLVER.IMS_PER_BATCH", str(args.batch), "DATALOADER.NUM_WORKERS", str(args.workers), *args.opts]
    cfg = load_config(name, own)
    prepare_datasets(cfg)
    cfg.defrost()
    cfg.SOLVER.BASE_LR = 0.0
    for node in (
        cfg.MODEL.HALONET,
        cfg.MODEL.TIMM,
        cfg.MODEL.RESNETS,
        cfg.MODEL.FPN,
        cfg.MODEL.ROI_BOX_HEAD,
        cfg.MODEL.ROI_MASK_HEAD,
    ):
        node.NORM = "BN" if node.NORM == "SyncBN" else node.NORM
    cfg.freeze()
    return cfg


def measure(
    contenders: dict[str, Contender], rounds: int, say: Callable[[str], Any]
) -> dict[str, dict[str, list[float]]]:
    """Config -> figure -> seconds of each round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in _FIGURES} for name in contenders}
    with EventStorage():
        for number in range(rounds + 1):  # the first starts workers and gets memory, and does not count
            for name, contender in contenders.items():
                taken = (contender.loader(), *contender.step())
                for figure, value in zip(_FIGURES, taken, strict=True) if number else ():
                    seconds[name][figure].append(value)
            say(f"round {number} of {rounds}" if number else "warmed up")
    return seconds


def table(seconds: dict[str, dict[str, list[float]]], batch: int) -> str:
    """Medians, one row a config."""
    rows = []
    for name, figures in seconds.items():
        loader, step, waiting = (statistics.median(figures[figure]) for figure in _FIGURES)
        rows.append([name, f"{batch / loader:.2f}", f"{batch / step:.2f}", f"{step:.2f} s", f"{waiting / step:.1%}"])
    return tabulate(
        rows, ["config", "loader images/s", "step images/s", "step", "of it waiting for data"], tablefmt="github"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        contenders = {name: Contender(config(name, args), args.batches) for name in args.config_file}
    except (ConfigError, DatasetError) as error:
        print(error, file=sys.stderr)
        return 2
    seconds = measure(contenders, args.rounds, lambda text: print(text, flush=True))
    print(
        f"batch {args.batch}, {args.workers} workers, {torch.get_num_threads()} CPU threads, medians of {args.rounds} rounds"
    )
    print(table(seconds, args.batch))
    if args.output:
        write_json(args.output, {"arguments": json.loads(json.dumps(vars(args), default=str)), "seconds": seconds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
