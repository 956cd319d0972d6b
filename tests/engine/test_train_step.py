"""The step: every way to save time or memory gives the plain run's losses, and accumulation is a larger batch."""

import copy
import itertools

from halodet.engine import Trainer
from halodet.engine.nan_guard import NonFiniteError
from halodet.engine.train_step import Step
from halodet.errors import TrainingStopped

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from small_run import NO_CHANCE, losses, make_trainer
from torch import nn

ITERATIONS = {"SOLVER.MAX_ITER": 2}


@pytest.fixture
def plain(shapes, tmp_path):
    trainer = make_trainer(tmp_path / "plain", ITERATIONS, NO_CHANCE)
    trainer.train()
    return trainer


# relative differences allowed: none, rounding of another order of sums, and rounding to bf16's 8 bits
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"MODEL.HALONET.USE_ACT_CHECKPOINT": "['res2', 'res4']"}, 0.0),
        ({"MODEL.CHANNELS_LAST": True}, 1e-4),
        ({"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "bf16"}, 1e-2),
        ({"SOLVER.AMP.ENABLED": True, "MODEL.HALONET.USE_ACT_CHECKPOINT": "['res2', 'res3', 'res4', 'res5']"}, 1e-2),
    ],
)
def test_losses_are_the_plain_runs(plain, options, tolerance, tmp_path):
    trainer = make_trainer(tmp_path / "option", ITERATIONS, NO_CHANCE, options)
    trainer.train()
    expected, got = losses(plain), losses(trainer)
    assert expected.keys() == got.keys() and "loss_mask" in got and len(got["total_loss"]) == 2
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=tolerance, abs=0), name
    if "SOLVER.AMP.ENABLED" in options:
        assert got["total_loss"] != expected["total_loss"], "nothing was computed in bf16"
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for (name, a), b in zip(plain.model.named_buffers(), trainer.model.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=max(tolerance, 1e-6), atol=tolerance), name


def test_the_steps_numbers_are_detectron2s(plain, shapes, tmp_path):
    trainer = make_trainer(tmp_path / "theirs", ITERATIONS, NO_CHANCE)
    trainer._trainer = SimpleTrainer(trainer.model, trainer.data_loader, trainer.optimizer)
    trainer.train()
    assert losses(trainer) == losses(plain)
    for (name, a), b in zip(plain.model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def gradients(trainer):
    """Of one iteration: those the optimizer was given."""
    seen = {}

    def record(*_):
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(record)
    trainer.train()
    return seen


def test_accumulated_batches_are_one_larger_batch(shapes, tmp_path):
    # Proposals only: losses of boxes and masks are means over what was proposed, which is more in one image than in another.
    # And norms that look at one image.
    one = {
        "SOLVER.MAX_ITER": 1,
        "MODEL.META_ARCHITECTURE": "ProposalNetwork",
        "MODEL.HALONET.NORM": "GN",
        "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    }
    large = make_trainer(tmp_path / "large", NO_CHANCE, one, {"SOLVER.IMS_PER_BATCH": 4})
    small = make_trainer(tmp_path / "small", NO_CHANCE, one, {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.GRAD_ACCUM_STEPS": 2})
    # the same images in both, of one size, so that none is padded more in the larger batch
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
    assert small._trainer.batches == 2 and large._trainer.batches == 1


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
    return Step(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def steps(step, count):
    with EventStorage() as storage:
        for step.iter in range(count):
            step.run_step()
    return storage


def test_accumulation_against_gradients_computed_by_hand():
    step = toy(1, 2, 5, accumulate=3)
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
    assert scales[-1] == scales[-2] >= 1, "it did not come to a scale that fits"
    assert any(not torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    state = step.state_dict()
    assert state["grad_scaler"]["scale"] == scales[-1] and state["batches"] == 13
    resumed = toy(1, dtype=torch.float16)
    resumed.load_state_dict(state)
    assert resumed.scaler.get_scale() == scales[-1] and resumed.batches == 13
    toy(1).load_state_dict(state)  # goes on in float32


def test_fp16_gradients_that_overflow_at_every_scale_stop_the_run():
    step = toy(*[1e3] * 40, dtype=torch.float16)
    step.model.linear.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="gradients are not finite although their scale has come down to 0.5"):
        steps(step, 40)
    assert step.iter == 16


@pytest.fixture
def tf32():
    """The two switches, put back afterwards."""
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


def test_a_compiled_backbone_keeps_its_names_and_its_numbers(shapes, tmp_path):
    # One convolutional stage: compiling takes long.
    opts = {"MODEL.HALONET.MIXERS": "('conv', 'conv', 'conv', 'halo')", "SOLVER.MAX_ITER": 1}
    plain = make_trainer(tmp_path / "plain", NO_CHANCE, opts)
    compiled = make_trainer(tmp_path / "compiled", NO_CHANCE, opts, {"MODEL.COMPILE": True})
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    plain.train()
    compiled.train()
    assert compiled.model.backbone._compiled_call_impl is not None
    for name, values in losses(plain).items():
        assert losses(compiled)[name] == pytest.approx(values, rel=1e-3), name
    saved = torch.load(tmp_path / "compiled/model_final.pth", weights_only=True)["model"]
    assert list(saved) == list(Trainer.build_model(plain.cfg).state_dict())


def test_a_backbone_that_cannot_be_compiled_is_told_in_one_sentence(shapes, tmp_path):
    def broken(graph, inputs):
        raise ImportError("libkernel.so: file too short")  # what a compiler leaves that was killed

    trainer = make_trainer(tmp_path, {"MODEL.COMPILE": True, "SOLVER.MAX_ITER": 1})
    trainer.model.backbone.compile(backend=broken)
    with pytest.raises(
        TrainingStopped, match=r"cannot compile the backbone \(.*file too short.*\): set it to False, .* remove"
    ) as error:
        trainer.train()
    assert "\n" not in str(error.value)
