"""A run that is stopped and goes on ends with the weights of the run that was not: every bit of them."""

import logging
import os
import random
import signal
from types import FunctionType

from halodet.data import write_shapes
from halodet.engine import CANNOT_WRITE, PREEMPTED, Trainer, load_config
from halodet.evaluation.coco import RobustCOCOEvaluator
from halodet.utils import rng

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.modeling.meta_arch import retinanet
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from fvcore.nn import sigmoid_focal_loss

pytestmark = pytest.mark.usefixtures("one_thread")
NAME, VAL = "resume_shapes", "resume_shapes_val"
LAST = 6
TINY = [
    "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(48, 64)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice",
    "DATASETS.TRAIN", f"('{NAME}',)", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "1", "SOLVER.BASE_LR", "0.002",
    "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", str(LAST), "SEED", "5", "INPUT.MIN_SIZE_TEST", "48",
    "TEST.DETECTIONS_PER_IMAGE", "5",
    "INPUT.MASK_FORMAT", "bitmask",
]  # fmt: skip
MASK_RCNN = ["quick/mask_rcnn_halo_shapes"]
DEEP = ["MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)", "MODEL.FPN.OUT_CHANNELS", "32", "SOLVER.STEPS", "(4,)"]
RETINANET = ["retinanet_halo_h4", "MODEL.RETINANET.NUM_CLASSES", "6", "MODEL.RETINANET.NUM_CONVS", "1", *DEEP]


@pytest.fixture(scope="module", autouse=True)
def shapes(tmp_path_factory):
    setup_logger()
    root = tmp_path_factory.mktemp("shapes")
    register_coco_instances(NAME, {}, str(write_shapes(root, "train", 12)), str(root / "train"))
    register_coco_instances(VAL, {}, str(write_shapes(root, "val", 2)), str(root / "val"))
    yield
    for name in (NAME, VAL):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class Send(HookBase):
    """Asks the run to stop in the middle of an iteration, as another program would."""

    def __init__(self, number, iteration):
        self.number, self.iteration = number, iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.number)


def trainer(folder, config=MASK_RCNN, *opts, seed=5, resume=False):
    cfg = load_config(
        config[0], [*TINY, "DATASETS.TEST", "()", *config[1:], "OUTPUT_DIR", str(folder), *map(str, opts)]
    )
    seed_all_rng(seed)
    made = Trainer(cfg)
    made.resume_or_load(resume=resume)
    return made


def as_in_a_new_process(monkeypatch):
    """TorchScript compiles a function by what its first calls in a process were."""
    kept = sigmoid_focal_loss
    loss = FunctionType(kept.__code__, kept.__globals__, kept.__name__, kept.__defaults__, kept.__closure__)
    loss.__annotations__ = kept.__annotations__
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", torch.jit.script(loss))


def stopped(made, iteration, number=signal.SIGTERM):
    made.register_hooks([Send(number, iteration)])
    with pytest.raises(SystemExit) as caught:
        made.train()
    return caught.value.code


def entries(folder, name="model_final"):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def differences(left, right, path=""):
    """Where two checkpoints differ."""
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return [] if same else [path]
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        return [found for key in left for found in differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, list | tuple):
        return [
            found
            for i, (a, b) in enumerate(zip(left, right, strict=True))
            for found in differences(a, b, f"{path}.{i}")
        ]
    return [] if left == right or path.endswith(".started") else [path]


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        (MASK_RCNN, []),
        (MASK_RCNN, ["DATASETS.TEST", f"('{VAL}',)", "TEST.EVAL_PERIOD", 2]),
        (
            MASK_RCNN,
            [
                "MODEL.HALONET.NORM",
                "BN",
                "TEST.PRECISE_BN.ENABLED",
                True,
                "TEST.PRECISE_BN.NUM_ITER",
                2,
                "TEST.EVAL_PERIOD",
                2,
            ],
        ),
        (MASK_RCNN, ["MODEL.EMA.ENABLED", True, "SOLVER.GRAD_ACCUM_STEPS", 2, "SOLVER.AMP.ENABLED", True]),
        (MASK_RCNN, ["SOLVER.OPTIMIZER", "SGD", "MODEL.HALONET.DROP_PATH_RATE", "0.5", "MODEL.HALONET.NORM", "BN"]),
    ],
)
def test_weights_optimizer_and_random_states_are_bit_equal(tmp_path, config, opts):
    trainer(tmp_path / "whole", config, *opts).train()
    # Stopped twice, with other numbers of workers; the evaluation after the first stop is never made.
    assert stopped(trainer(tmp_path / "parts", config, *opts, "DATALOADER.NUM_WORKERS", 2), 1) == PREEMPTED
    again = trainer(tmp_path / "parts", config, *opts, seed=99, resume=True)
    assert again.start_iter == 2
    assert stopped(again, 4, signal.SIGUSR1) == PREEMPTED
    trainer(tmp_path / "parts", config, *opts, "DATALOADER.NUM_WORKERS", 2, seed=98, resume=True).train()
    whole, parts = entries(tmp_path / "whole"), entries(tmp_path / "parts")
    assert differences(whole, parts) == []
    first = entries(tmp_path / "whole", "model_0000001")
    assert len(differences(whole["model"], first["model"])) > 50, "little was trained"


def test_what_torchscript_has_compiled_does_not_count(tmp_path, monkeypatch):
    as_in_a_new_process(monkeypatch)
    trainer(tmp_path / "whole", RETINANET).train()
    as_in_a_new_process(monkeypatch)
    assert stopped(trainer(tmp_path / "parts", RETINANET), 3) == PREEMPTED
    as_in_a_new_process(monkeypatch)
    trainer(tmp_path / "parts", RETINANET, resume=True).train()
    assert differences(entries(tmp_path / "whole"), entries(tmp_path / "parts")) == []


def test_an_average_that_detectron2_leaves_out_goes_on(tmp_path):
    made = trainer(tmp_path, RETINANET, "DATALOADER.NUM_WORKERS", 0)
    assert stopped(made, 1) == PREEMPTED
    again = trainer(tmp_path, RETINANET, "DATALOADER.NUM_WORKERS", 0, resume=True)
    assert again.model.loss_normalizer == made.model.loss_normalizer != 100


def test_what_has_changed_since_the_checkpoint_is_told_in_one_line(tmp_path, caplog):
    opts = ["MODEL.EMA.ENABLED", True, "SOLVER.MAX_ITER", 8]
    assert stopped(trainer(tmp_path, MASK_RCNN, *opts), 3) == PREEMPTED
    other = [
        "MODEL.EMA.ENABLED",
        False,
        "SOLVER.IMS_PER_BATCH",
        4,
        "SOLVER.BASE_LR",
        0.5,
        "DATASETS.TRAIN",
        f"('{VAL}',)",
    ]
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, MASK_RCNN, *opts, "TEST.EVAL_PERIOD", 7, "DATALOADER.NUM_WORKERS", 0, resume=True)
        assert not [record for record in caplog.records if "another config" in record.getMessage()]
        again = trainer(tmp_path, MASK_RCNN, *opts, *other, resume=True)
    lines = [record.getMessage() for record in caplog.records if "another config" in record.getMessage()]
    assert len(lines) == 1 and "\n" not in lines[0]
    change = (
        "MODEL.EMA.ENABLED True is now False",
        "SOLVER.IMS_PER_BATCH 2 is now 4",
        "images, checksum",
        f"now ('{VAL}',)",
    )
    for told in (*change, "0.5", "SOLVER.BASE_LR: the checkpoint's stay"):
        assert told in lines[0], lines[0]
    assert again.start_iter == 4 and again.data_loader.loader.start == 2, "8 images were seen"
    assert {round(group["initial_lr"], 6) for group in again.optimizer.param_groups} == {0.002}, (
        "the checkpoint's stays, as the line says"
    )


def test_losing_the_state_of_the_run_is_not_bit_equal(tmp_path):
    """What the test above would say of Detectron2's own checkpoints."""
    trainer(tmp_path / "whole").train()
    assert stopped(trainer(tmp_path / "parts"), 1) == PREEMPTED
    file = tmp_path / "parts" / "model_0000001.pth"
    data = torch.load(file, weights_only=True)
    del data["trainer"]["hooks"]["RunState"]
    torch.save(data, file)
    trainer(tmp_path / "parts", resume=True).train()
    assert differences(entries(tmp_path / "whole")["model"], entries(tmp_path / "parts")["model"])


def test_a_stopped_run_leaves_its_handlers_and_says_what_it_did(tmp_path, caplog):
    before = signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.WARNING):
        assert stopped(trainer(tmp_path), 2) == PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Stopped by SIGTERM after iteration 2" in caplog.text
    assert "Traceback" not in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert entries(tmp_path, "model_0000002")["iteration"] == 2


def test_a_signal_at_the_last_iteration_leaves_before_the_evaluation(tmp_path):
    opts = ["DATASETS.TEST", f"('{VAL}',)", "TEST.EVAL_PERIOD", 100]
    assert stopped(trainer(tmp_path, MASK_RCNN, *opts), LAST - 1) == PREEMPTED
    assert (tmp_path / "model_final.pth").is_file() and not (tmp_path / "inference").exists()
    trainer(tmp_path, MASK_RCNN, *opts, resume=True).train()
    assert (tmp_path / "inference").exists()


def test_a_signal_in_an_evaluation_leaves_with_a_checkpoint_at_once(tmp_path, monkeypatch):
    opts = [
        "DATASETS.TEST",
        f"('{VAL}',)",
        "TEST.EVAL_PERIOD",
        2,
        "SOLVER.CHECKPOINT_PERIOD",
        100,
        "SOLVER.MAX_ITER",
        3,
    ]
    trainer(tmp_path / "whole", MASK_RCNN, *opts).train()
    made = trainer(tmp_path / "parts", MASK_RCNN, *opts)
    process, evaluated = RobustCOCOEvaluator.process, []

    def process_first(self, inputs, outputs):
        torch.rand(7)
        os.kill(os.getpid(), signal.SIGTERM)
        evaluated.extend(inputs)
        return process(self, inputs, outputs)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as caught:
        patched.setattr(RobustCOCOEvaluator, "process", process_first)
        made.train()
    assert len(evaluated) == 1
    assert caught.value.code == PREEMPTED
    assert entries(tmp_path / "parts", "model_0000001")["iteration"] == 1
    trainer(tmp_path / "parts", MASK_RCNN, *opts, seed=9, resume=True).train()
    assert differences(entries(tmp_path / "whole"), entries(tmp_path / "parts")) == []


def test_keeping_some(tmp_path):
    (tmp_path / ".model_0000001.pth.abc.part").write_text("half")
    (tmp_path / "notes.pth").write_text("of the user's own")
    trainer(tmp_path, MASK_RCNN, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 2, "SOLVER.CHECKPOINT_PERIOD", 1).train()
    assert {name for name in os.listdir(tmp_path) if ".pth" in name} == {
        "model_0000004.pth",
        "model_0000005.pth",
        "model_final.pth",
        "notes.pth",
    }


def test_what_an_earlier_run_left_does_not_take_the_place_of_new_ones(tmp_path):
    for name in ("model_0000003.pth", "model_0099999.pth"):
        (tmp_path / name).write_text("of an earlier run")
    trainer(tmp_path, MASK_RCNN, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 1, "SOLVER.MAX_ITER", 5).train()
    assert {path.name for path in tmp_path.glob("model_0*")} == {"model_0000003.pth", "model_0099999.pth"}
    assert entries(tmp_path, "model_0000003")["iteration"] == 3


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "model_0000000.pth").mkdir()  # which unlink refuses
    trainer(tmp_path, MASK_RCNN, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 1).train()
    assert (tmp_path / "model_final.pth").is_file()
    assert "model_0000000.pth cannot be removed" in caplog.text


def test_without_room_for_two_checkpoints_nothing_is_trained(tmp_path, monkeypatch, caplog):
    made = trainer(tmp_path)
    usage = type("usage", (), {"free": 3 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(SystemExit) as caught:
        made.train()
    assert caught.value.code == CANNOT_WRITE and made.iter == 0
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(lines) == 1 and "has 3.0 MiB free, and a checkpoint takes about" in lines[0] and "\n" not in lines[0]


def test_the_estimate_of_a_checkpoints_size_is_near(tmp_path):
    for optimizer, average in (("SGD", True), ("AdamW", False)):
        opts = ["SOLVER.OPTIMIZER", optimizer, "SOLVER.MAX_ITER", 1, "MODEL.EMA.ENABLED", average]
        made = trainer(tmp_path / optimizer, MASK_RCNN, *opts)
        hook = next(hook for hook in made._hooks if hasattr(hook, "save_now"))
        hook.trainer = made
        before = hook._size()
        made.train()
        size = (tmp_path / optimizer / "model_final.pth").stat().st_size
        assert 0.9 * size < before < size and 0.9 * size < hook._size() < size


def test_random_states_go_through_a_checkpoint(tmp_path):
    seed_all_rng(4)
    random.gauss(0, 1), np.random.randn()  # each leaves a second number for the next time
    torch.save(rng.capture(), tmp_path / "state.pth")
    expected = random.gauss(0, 1), np.random.randn(), random.random(), np.random.rand(), torch.rand(1)
    seed_all_rng(5)
    rng.restore(torch.load(tmp_path / "state.pth", weights_only=True))
    assert (random.gauss(0, 1), np.random.randn(), random.random(), np.random.rand(), torch.rand(1)) == expected
