"""The step of the trainer: performance flags keep the losses, and accumulated batches equal one larger batch."""

import copy
import itertools

from halodet.engine import Trainer
from halodet.engine.nan_guard import NonFiniteError
from halodet.engine.train_step import GradAccumTrainer
from halodet.errors import TrainingStopped

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from helpers import assert_same_tensors
from small_run import DETERMINISTIC, losses, make_trainer
from torch import nn

ITERATIONS = {"SOLVER.MAX_ITER": 2}
_CACHE = {}


@pytest.fixture
def plain(shapes, tmp_path_factory):
    """A run without any flag, trained once for this file."""
    if "plain" not in _CACHE:
        _CACHE["plain"] = make_trainer(tmp_path_factory.mktemp("plain"), ITERATIONS, DETERMINISTIC)
        _CACHE["plain"].train()
    return _CACHE["plain"]


# Relative tolerances: exact, another order of summation, and bf16's 8 bits.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"MODEL.HALONET.USE_ACT_CHECKPOINT": "['res2', 'res4']"}, 0.0),
        ({"MODEL.CHANNELS_LAST": True}, 1e-4),
        ({"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "bf16"}, 1e-2),
        ({"SOLVER.AMP.ENABLED": True, "MODEL.HALONET.USE_ACT_CHECKPOINT": "['res2', 'res3', 'res4', 'res5']"}, 1e-2),
    ],
)
def test_performance_flags_keep_the_losses(plain, options, tolerance, tmp_path):
    trainer = make_trainer(tmp_path / "option", ITERATIONS, DETERMINISTIC, options)
    trainer.train()
    expected, got = losses(plain), losses(trainer)
    assert expected.keys() == got.keys() and "loss_mask" in got and len(got["total_loss"]) == 2
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=tolerance, abs=0), name
    if "SOLVER.AMP.ENABLED" in options:
        assert got["total_loss"] != expected["total_loss"], "bf16 was not used"
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for (name, a), b in zip(plain.model.named_buffers(), trainer.model.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=max(tolerance, 1e-6), atol=tolerance), name


def test_losses_and_weights_equal_those_of_simple_trainer(plain, shapes, tmp_path):
    trainer = make_trainer(tmp_path / "simple", ITERATIONS, DETERMINISTIC)
    trainer._trainer = SimpleTrainer(trainer.model, trainer.data_loader, trainer.optimizer)
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert_same_tensors(trainer.model.state_dict(), plain.model.state_dict())


def gradients(trainer):
    """Train one iteration and return the gradients that the optimizer was given."""
    seen = {}

    def record(*_):
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(record)
    trainer.train()
    return seen


def test_accumulated_batches_are_one_larger_batch(shapes, tmp_path):
    # Proposals only, since losses of boxes and masks are means over proposals, whose number differs between images.
    # GN, since BN's statistics are those of the batch.
    one = {
        "SOLVER.MAX_ITER": 1,
        "MODEL.META_ARCHITECTURE": "ProposalNetwork",
        "MODEL.HALONET.NORM": "GN",
        "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    }
    large = make_trainer(tmp_path / "large", DETERMINISTIC, one, {"SOLVER.IMS_PER_BATCH": 4})
    small = make_trainer(
        tmp_path / "small", DETERMINISTIC, one, {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.GRAD_ACCUM_STEPS": 2}
    )
    # The same images in both, of one size, so that padding is the same.
    drawn = itertools.chain.from_iterable(itertools.islice(large.data_loader, 8))
    images = [entry for entry in drawn if entry["image"].shape == (3, 64, 85)][:4]
    assert len(images) == 4
    large._trainer._data_loader_iter_obj = iter([images])
    small._trainer._data_loader_iter_obj = iter([images[:2], images[2:]])
    expected, got = gradients(large), gradients(small)
    assert losses(small)["total_loss"] == pytest.approx(losses(large)["total_loss"], rel=1e-5)
    assert expected.keys() == got.keys() and len(got) > 50
    for name, gradient in expected.items():
        assert torch.allclose(gradient, got[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9), name


class Toy(nn.Module):
    """Two losses of a linear layer, from batches of Detectron2's form."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, batch):
        out = self.linear(torch.stack([entry["image"] for entry in batch]))
        return {"loss_a": out[:, 0].square().mean(), "loss_b": out[:, 1].abs().mean()}


def toy(*values, **options):
    torch.manual_seed(0)
    batches = [
        [{"image": torch.full((3,), float(v)), "file_name": f"{i}.jpg", "image_id": i}] for i, v in enumerate(values)
    ]
    model = Toy()
    return GradAccumTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def steps(step, count):
    with EventStorage() as storage:
        for step.iter in range(count):
            step.run_step()
    return storage


def test_accumulation_against_gradients_computed_by_hand():
    step = toy(1, 2, 5, accum_steps=3)
    model, expected = copy.deepcopy(step.model), []
    for batch in step.data_loader:
        expected.append(torch.autograd.grad(sum(model(batch).values()), list(model.parameters())))
    for p, *gradients in zip(model.parameters(), *expected, strict=True):
        p.data -= 0.1 * sum(gradients) / 3
    storage = steps(step, 1)
    for p, q in zip(model.parameters(), step.model.parameters(), strict=True):
        assert torch.allclose(p, q)
    assert storage.latest()["loss_b"][0] == pytest.approx(
        sum(toy().model(b)["loss_b"].item() for b in step.data_loader) / 3
    )


def test_fp16_scales_gradients_and_halves_the_scale_where_they_overflow():
    step = toy(*[10] * 40, dtype=torch.float16)
    before = copy.deepcopy(step.model.state_dict())
    storage = steps(step, 1)
    assert storage.latest()["grad_scale"][0] == 2.0**15
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    step.optimizer.param_groups[0]["lr"] = 1e-9
    scales = [steps(step, 1).latest()["grad_scale"][0] for _ in range(12)]
    assert scales[-1] == scales[-2] >= 1, "the scale did not settle"
    assert any(not torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    state = step.state_dict()
    assert state["grad_scaler"]["scale"] == scales[-1]
    resumed = toy(1, dtype=torch.float16)
    resumed.load_state_dict(state)
    assert resumed.scaler.get_scale() == scales[-1]
    toy(1).load_state_dict(state)  # float32 after fp16


def test_fp16_gradients_that_overflow_at_every_scale_stop_the_run():
    step = toy(*[1e3] * 40, dtype=torch.float16)
    step.model.linear.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="scale of 0.5"):
        steps(step, 40)
    assert step.iter == 16


@pytest.fixture
def tf32():
    """Read the two flags; restore them afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_tf32_is_set_as_asked(shapes, tmp_path, tf32):
    before = tf32()
    make_trainer(tmp_path)
    assert tf32() == before
    for asked in (True, False):
        make_trainer(tmp_path, {"MODEL.TF32": asked})
        assert tf32() == (asked, asked)


def test_a_compiled_backbone_keeps_its_names_and_its_losses(shapes, tmp_path, monkeypatch):
    # Traces forward and backward without the minutes of C++ compilation; test_export.py covers Inductor.
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    opts = {"MODEL.HALONET.MIXERS": "('conv', 'conv', 'conv', 'halo')", "SOLVER.MAX_ITER": 1}
    plain = make_trainer(tmp_path / "plain", DETERMINISTIC, opts)
    compiled = make_trainer(tmp_path / "compiled", DETERMINISTIC, opts, {"MODEL.COMPILE": True})
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    plain.train()
    compiled.train()
    assert compiled.model.backbone._compiled_call_impl is not None
    for name, values in losses(plain).items():
        assert losses(compiled)[name] == pytest.approx(values, rel=1e-3), name
    saved = torch.load(tmp_path / "compiled/model_final.pth", weights_only=True)["model"]
    assert list(saved) == list(Trainer.build_model(plain.cfg).state_dict())


def test_a_compile_error_names_the_key_and_the_reason(shapes, tmp_path):
    def broken(graph, inputs):
        raise ImportError("libkernel.so: file too short")  # left by a compiler that was killed

    trainer = make_trainer(tmp_path, {"MODEL.COMPILE": True, "SOLVER.MAX_ITER": 1})
    trainer.model.backbone.compile(backend=broken)
    with pytest.raises(TrainingStopped, match="MODEL.COMPILE=True.*file too short") as error:
        trainer.train()
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_batch_norm_of_one_value_per_channel_is_one_message(train_net, tmp_path, capsys):
    """A config that is valid, but whose last maps have a single pixel: PyTorch's ValueError names no key."""
    keys = ["INPUT.MIN_SIZE_TRAIN", "(16,)", "INPUT.MAX_SIZE_TRAIN", "16", "SOLVER.IMS_PER_BATCH", "1"]
    assert train_net(tmp_path, *keys, "MODEL.HALONET.NORM", "BN", "SOLVER.MAX_ITER", "2") == 2
    printed = "".join(capsys.readouterr())
    assert "MODEL.HALONET.NORM" in printed and "[1, " in printed and "Traceback" not in printed
