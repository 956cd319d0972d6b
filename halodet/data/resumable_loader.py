"""The training data of a run as a function of its seed: which images stand in batch k, and how each is augmented.

Detectron2's samplers give the infinite, seeded sequence of indices. Each of its images has a position in that sequence, counted over all
processes, and whatever is drawn at random while it is read is drawn from (seed, position): so neither the number of loading workers, nor
what they had read ahead, nor a restart changes it. Batches of like aspect ratio are put together from the dataset's widths and heights,
before any image is read; to go on at batch k, the indices before it are drawn and dropped, which takes a second per ten million.
"""

from __future__ import annotations

import itertools
import os
import signal
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from halodet.utils.rng import seeded

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

MAX_REPLACEMENTS = 100
LIKE_REPLACEMENTS = 5  # of them of the same aspect group, the first ones
_GRACE = 600  # seconds a worker stays after it was told to end


class ResumableTrainLoader:
    """Batches of a run, endless; iterating begins at batch ``start``.

    Attributes:
        seed: decides all of it; SEED of the config, or a drawn one where that is below 0.
        start: the batch, counted from 0, at which the next iteration over it begins; to be set when a run goes on.
        described: the number of images, and a checksum of which of them are wide.
        batches: number of batches this process has been given so far, of this run and of the one it goes on from.

    Args:
        cfg: as for Detectron2's build_detection_train_loader.
        mapper: makes of a dataset's entry what the model takes, or None where that cannot be; Detectron2's DatasetMapper if not given.
            It may draw from Python's, numpy's and PyTorch's global generators, and keep no random state of its own.
        dataset: entries of the datasets; those of DATASETS.TRAIN if not given.

    Raises:
        ValueError: SOLVER.IMS_PER_BATCH cannot be shared out over the processes.
    """

    def __init__(
        self,
        cfg: CfgNode,
        mapper: Callable[[dict], dict | None] | None = None,
        *,
        dataset: Sequence[dict] | None = None,
    ) -> None:
        processes = comm.get_world_size()
        batch_size, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, processes)
        if rest or batch_size < 1:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, expected a multiple of the {processes} processes"
            )
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        with seeded(self.seed):  # samplers without a seed draw one
            parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)
        entries = parts["dataset"]
        groups = np.zeros(len(entries), dtype=np.int8)
        if parts["aspect_ratio_grouping"]:
            groups = np.array([entry["width"] > entry["height"] for entry in entries], dtype=np.int8)
        self.described = f"{len(entries)} images, checksum {zlib.crc32(groups.tobytes()):08x}"
        listed = entries if isinstance(entries, Dataset) else DatasetFromList(entries, copy=False)
        self._dataset = _Seeded(listed, parts["mapper"], groups, self.seed)
        self._batches = _Batches(parts["sampler"], groups, batch_size)
        self._workers = parts["num_workers"]
        self.start = self.batches = 0
        self._running: Callable[[], Iterator[list[dict]] | None] = lambda: None

    def __iter__(self) -> Iterator[list[dict]]:
        running = self._iterate()
        self._running = weakref.ref(running)  # whoever drops the iteration ends its workers
        return running

    def seek(self, batch: int) -> None:
        """Begin the next iteration at ``batch``; one that is under way, and its count, are left alone."""
        self.start = batch
        if self._running() is None:
            self.batches = batch

    def close(self) -> None:
        """End the workers of the last iteration."""
        running = self._running()
        if running is not None:
            running.close()

    def _iterate(self) -> Iterator[list[dict]]:
        self.batches = self._batches.start = self.start
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._batches,
            num_workers=self._workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=go_on if os.name == "posix" else None,
            generator=Generator(),  # else it would draw from the one the model draws from
        )
        for batch in loader:
            self.batches += 1
            yield batch


class _Batches(Sampler):
    """Lists of (position, index), each of one group of images, from the batch ``start`` on."""

    def __init__(self, sampler: Sampler, groups: np.ndarray, batch_size: int) -> None:
        self.sampler, self.groups, self.batch_size, self.start = sampler, groups, batch_size, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._all(), self.start, None)

    def _all(self) -> Iterator[list[tuple[int, int]]]:
        groups, waiting = self.groups.tolist(), ([], [])
        # Detectron2's samplers give this process every n-th of the indices.
        for position, index in zip(itertools.count(comm.get_rank(), comm.get_world_size()), self.sampler, strict=False):
            bucket = waiting[groups[index]]
            bucket.append((position, index))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


class _Seeded(Dataset):
    """(position, index) -> what the mapper makes of it; where that is nothing, of another image, of the same group if one is found soon."""

    def __init__(self, dataset: Dataset, mapper: Callable[[dict], dict | None], groups: np.ndarray, seed: int) -> None:
        self.dataset, self.mapper, self.groups, self.seed = dataset, mapper, groups, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        with seeded(self.seed, position):
            like = np.flatnonzero(self.groups == self.groups[index])
            for attempt in range(MAX_REPLACEMENTS):
                mapped = self.mapper(self.dataset[index])
                if mapped is not None:
                    return mapped
                # Batches of one shape save padding, no more: a small group may hold nothing usable at all.
                index = int(
                    like[np.random.randint(len(like))]
                    if attempt < LIKE_REPLACEMENTS
                    else np.random.randint(len(self.groups))
                )
        raise RuntimeError(
            f"{MAX_REPLACEMENTS} images drawn one after the other cannot be used: look at the lines about them in the log"
        )


def go_on(worker: int) -> None:
    """To be called in a loading worker: what asks a run to stop often reaches all of its processes, and workers are still needed then.

    They load on for as long as an evaluation may take; those of a process that has ended end by themselves.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
