"""Fixtures of all tests, and how they are divided over the workers of pytest-xdist."""

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

# One thread per process, also in the processes that tests start: workers share the cores. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# With a handler, halodet.Trainer leaves this logger as it is, and pytest sees its records.
logging.getLogger("halodet").addHandler(logging.NullHandler())
# Without a GPU the Triton kernels are interpreted. Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from halodet.data.user_datasets import USER_DATASETS  # noqa: E402

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402
from helpers import dataset_flags, load_tool, read_metrics, run_python  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "engine"))  # for small_run, which scripts of other processes import too


TINY = [
    "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4",
]  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Assign tests to the workers of pytest-xdist.

    Tests that start or signal processes run one after the other; each other file stays on one worker, because its
    fixtures are made once. Long files come first, so that no worker is left alone with one of them.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        distributed = item.get_closest_marker("distributed")
        if item.get_closest_marker("xdist_group") is None:
            group = "processes" if distributed else str(item.path.relative_to(Path(__file__).parent))
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (not item.get_closest_marker("distributed"), item.path not in slow))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Flags of four drawn scenes, for training and for evaluation."""
    return dataset_flags(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture(scope="session")
def tool():
    """tools/train_net.py, or another tool, in this process: list of arguments -> exit code."""

    def run(arguments, name="train_net"):
        with restore_process():
            return load_tool(name).main(arguments)

    return run


@pytest.fixture
def train_net(scenes, tool):
    """tools/train_net.py with a tiny detector: (output folder, keys and values, further flags) -> exit code."""

    def run(output, *opts, flags=(), config="quick/mask_rcnn_halo_shapes", tiny=TINY):
        return tool([f"--config-file={config}", *scenes, *map(str, (*flags, "OUTPUT_DIR", output, *tiny, *opts))])

    return run


@contextmanager
def restore_process():
    """Remove the datasets and log handlers that a run adds to its process."""
    setup_logger.cache_clear()
    loggers = [logging.getLogger(name) for name in ("halodet", "detectron2", "fvcore")]
    before = [(log, list(log.handlers), log.propagate, log.level) for log in loggers]
    try:
        yield
    finally:
        for log, handlers, log.propagate, level in before:
            for handler in set(log.handlers) - set(handlers):
                log.removeHandler(handler)
                handler.close()
            log.setLevel(level)
        for name in USER_DATASETS:
            if name in DatasetCatalog.list():
                DatasetCatalog.remove(name)
                MetadataCatalog.pop(name)


@pytest.fixture(scope="session")
def metrics():
    """See :func:`helpers.read_metrics`."""
    return read_metrics


@pytest.fixture(scope="session")
def torchrun():
    """Run a script in two processes without GPUs: arguments -> (torchrun's exit code, everything that was printed)."""

    def start(*arguments, **options):
        run = run_python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *arguments, **options)
        return run.returncode, run.stdout + run.stderr

    return start


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def shapes(shapes_folder, monkeypatch):
    """Change to a folder in which runs draw datasets/shapes once per worker."""
    monkeypatch.chdir(shapes_folder)
    return shapes_folder
