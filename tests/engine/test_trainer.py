"""What the trainer adds to Detectron2's, and what it leaves to its users."""

from halodet.engine import Trainer

import pytest
import torch
from detectron2.data import build_detection_train_loader
from small_run import VAL, make_config, make_trainer


def test_no_evaluation_after_a_failed_last_iteration(shapes, tmp_path):
    """With several processes it would wait for ranks that have ended, and hide the error."""
    trainer = make_trainer(tmp_path, {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": f"('{VAL}',)"})
    trainer.model.register_forward_pre_hook(
        lambda *_: {}["a thing"] if trainer.iter == 1 and trainer.model.training else None
    )
    with pytest.raises(KeyError, match="a thing"):
        trainer.train()
    assert not (tmp_path / "inference").exists()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_gradients_are_clipped(tmp_path, name):
    clip = {
        "SOLVER.OPTIMIZER_NAME": name,
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
    }
    cfg = make_config(tmp_path, clip)
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.step()
    assert all(parameter.grad.norm() <= 1.01 for parameter in model.parameters())


def test_gradients_of_the_full_model_are_clipped_together(tmp_path):
    keys = {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 0.5}
    cfg = make_config(tmp_path, {f"SOLVER.CLIP_GRADIENTS.{key}": value for key, value in keys.items()})
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = torch.cat([parameter.grad.flatten() for parameter in trained])
    optimizer.step()
    after = torch.cat([parameter.grad.flatten() for parameter in trained])
    torch.testing.assert_close(after, before * (0.5 / before.norm()), rtol=1e-4, atol=1e-9)


def test_the_optimizer_of_another_project_is_not_ignored_silently(tmp_path, caplog):
    cfg = make_config(tmp_path)
    cfg.defrost()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.OPTIMIZER_NAME = "ADAMW", "SGD"  # the first is Mask2Former's
    Trainer.build_optimizer(cfg, torch.nn.Linear(2, 2))
    assert "SOLVER.OPTIMIZER=ADAMW" in caplog.text and "SOLVER.OPTIMIZER_NAME=SGD" in caplog.text
    caplog.clear()
    cfg.SOLVER.OPTIMIZER_NAME = "AdamW"
    Trainer.build_optimizer(cfg, torch.nn.Linear(2, 2))
    assert "SOLVER.OPTIMIZER" not in caplog.text


class Detectron2Loader(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg)


def test_a_subclass_may_use_detectron2s_loader(shapes, tmp_path, caplog):
    keys = {"SOLVER.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 1, "TEST.PRECISE_BN.ENABLED": True}
    keys |= {"TEST.PRECISE_BN.NUM_ITER": 1}
    make_trainer(tmp_path, keys, trainer=Detectron2Loader).train()
    assert "build_train_loader" in caplog.text
    resumed = make_trainer(tmp_path, keys, {"SOLVER.MAX_ITER": 3}, trainer=Detectron2Loader)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 2
    with_halodets_loader = make_trainer(tmp_path, keys, {"SOLVER.MAX_ITER": 4})
    with_halodets_loader.resume_or_load(resume=True)
    assert with_halodets_loader.start_iter == 3
