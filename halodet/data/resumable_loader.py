"""Training data as a function of the seed: the images of batch k and their augmentation.

Detectron2's samplers give an infinite, seeded sequence of indices. Each image has a position in that sequence, counted
over all ranks, and all random numbers drawn while it is loaded come from (seed, position). So neither the number of
workers, nor their prefetching, nor a restart changes a batch. Batches are grouped by aspect ratio from the dataset's
widths and heights, before any image is read; to resume at batch k, the earlier indices are drawn and dropped, which
takes about a second per ten million.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from halodet.utils.rng import seeded

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

MAX_REPLACEMENTS = 100
SAME_GROUP_REPLACEMENTS = 5  # of these, the first ones, which are drawn from the same aspect ratio group


class ResumableTrainLoader:
    """Endless training batches; iteration starts at batch ``start``.

    Attributes:
        seed: seed of all randomness.
        total_batch_size: images per batch of all ranks together.
        start: index of the first batch of the next iteration; set it to resume.
        fingerprint: number of images, and a checksum of which of them are wide.
        batches: number of batches this rank has received so far, those before a resume included.

    Args:
        dataset: dataset dicts.
        mapper: maps a dataset dict to a sample, or to None if it cannot. It may use the global generators of Python,
            numpy and PyTorch, and must keep no random state of its own.
        total_batch_size: images per batch of all ranks together.
        sampler: infinite sampler of indices of this rank; all images in random order by default.
        aspect_ratio_grouping: whether the images of a batch are all wide or all tall, if the dicts have their sizes.
        num_workers: number of processes that load images; 0 for none.
        seed: seed of all randomness; a random one if it is negative.

    Raises:
        ValueError: ``total_batch_size`` is not a multiple of the world size.
    """

    @configurable
    def __init__(
        self,
        dataset: Sequence[dict],
        mapper: Callable[[dict], dict | None],
        *,
        total_batch_size: int,
        sampler: Sampler | None = None,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        seed: int = -1,
    ) -> None:
        world_size = comm.get_world_size()
        batch_size, rest = divmod(total_batch_size, world_size)
        if rest or batch_size < 1:
            raise ValueError(f"total_batch_size={total_batch_size} is invalid: expected a multiple of {world_size}.")
        self.total_batch_size = total_batch_size
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        sampler = sampler or TrainingSampler(len(dataset), seed=self.seed)
        groups = np.zeros(len(dataset), dtype=np.int8)
        if aspect_ratio_grouping:  # datasets without boxes may not have the sizes; they are not grouped
            sizes = ((record.get("width", 0), record.get("height", 0)) for record in dataset)
            groups = np.array([width > height for width, height in sizes], dtype=np.int8)
        self.fingerprint = f"{len(dataset)} images, checksum {zlib.crc32(groups.tobytes()):08x}"
        records = dataset if isinstance(dataset, Dataset) else DatasetFromList(dataset, copy=False)
        self._dataset = _SeededDataset(records, mapper, groups, self.seed)
        self._batch_sampler = _GroupedBatchSampler(sampler, groups, batch_size)
        self._num_workers = num_workers
        self.start = self.batches = 0
        self._running: Callable[[], Iterator[list[dict]] | None] = lambda: None

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        mapper: Callable[[dict], dict | None] | None = None,
        *,
        dataset: Sequence[dict] | None = None,
    ) -> dict[str, Any]:
        """Return the constructor arguments for ``cfg``; the sampler is that of DATALOADER.SAMPLER_TRAIN.

        Args:
            cfg: config.
            mapper: see the class; Detectron2's ``DatasetMapper`` by default.
            dataset: dataset dicts; those of DATASETS.TRAIN by default.
        """
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        with seeded(seed):  # a sampler without a seed draws one
            return {**build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset), "seed": seed}

    def __iter__(self) -> Iterator[list[dict]]:
        running = self._iterate()
        self._running = weakref.ref(running)  # dropping the iterator must stop its workers
        return running

    def seek(self, batch: int) -> None:
        """Start the next iteration at ``batch``; a running iteration and its count are unchanged."""
        self.start = batch
        if self._running() is None:
            self.batches = batch

    def close(self) -> None:
        """Stop the workers of the last iteration."""
        running = self._running()
        if running is not None:
            running.close()

    def _iterate(self) -> Iterator[list[dict]]:
        self.batches = self._batch_sampler.start = self.start
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._batch_sampler,
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=ignore_stop_signals if os.name == "posix" else None,
            generator=Generator(),  # by default it would draw from the model's generator
        )
        with _stop_signals_blocked():
            batches = iter(loader)  # starts the workers
        for batch in batches:
            self.batches += 1
            yield batch


class _GroupedBatchSampler(Sampler):
    """Yield lists of (position, index) of one aspect ratio group, from batch ``start`` on."""

    def __init__(self, sampler: Sampler, groups: np.ndarray, batch_size: int) -> None:
        self.sampler, self.groups, self.batch_size, self.start = sampler, groups, batch_size, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._all(), self.start, None)

    def _all(self) -> Iterator[list[tuple[int, int]]]:
        groups, buckets = self.groups.tolist(), ([], [])
        # Detectron2's samplers give this rank every n-th index.
        for position, index in zip(itertools.count(comm.get_rank(), comm.get_world_size()), self.sampler, strict=False):
            bucket = buckets[groups[index]]
            bucket.append((position, index))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


class _SeededDataset(Dataset):
    """Map (position, index) to a sample; an image that maps to None is replaced, if possible by one of its group."""

    def __init__(self, dataset: Dataset, mapper: Callable[[dict], dict | None], groups: np.ndarray, seed: int) -> None:
        self.dataset, self.mapper, self.groups, self.seed = dataset, mapper, groups, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        with seeded(self.seed, position):
            group = np.flatnonzero(self.groups == self.groups[index])
            for attempt in range(MAX_REPLACEMENTS):
                sample = self.mapper(self.dataset[index])
                if sample is not None:
                    return sample
                # Batches of one group only save padding, and a small group may hold no usable image at all.
                same_group = attempt < SAME_GROUP_REPLACEMENTS
                index = int(group[np.random.randint(len(group))] if same_group else np.random.randint(len(self.groups)))
        raise RuntimeError(f"{MAX_REPLACEMENTS} consecutive images failed to load. Fix: see the warnings in the log.")


def ignore_stop_signals(worker_id: int) -> None:
    """Keep a DataLoader worker running when a stop signal reaches all processes of a run; a ``worker_init_fn``.

    The workers are needed until a final evaluation is done. They exit when their parent process sends SIGTERM, as
    multiprocessing does at its exit, or has ended.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM ends them
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1,))


def _exit_on_sigterm_of_parent() -> None:
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(0)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals, also in processes started meanwhile: PyTorch lets a worker die of SIGTERM at its start."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
