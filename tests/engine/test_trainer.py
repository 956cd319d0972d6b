"""What the trainer adds to Detectron2's."""

from halodet.engine import Trainer, load_config, prepare_datasets

import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_backbone
from detectron2.structures import Boxes, Instances
from small_run import make_trainer

SMALL = ["MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)", "MODEL.HALONET.BASE_WIDTH", "16"]


def optimizer(*opts):
    cfg = load_config("mask_rcnn_halo_h0", [*SMALL, *opts])
    model = build_backbone(cfg)
    return model, Trainer.build_optimizer(cfg, model)


def test_adamw_spares_norms_and_relative_position_tables():
    model, adamw = optimizer(
        "SOLVER.OPTIMIZER", "AdamW", "SOLVER.WEIGHT_DECAY", "0.05", "SOLVER.WEIGHT_DECAY_NORM", "0.0"
    )
    assert isinstance(adamw, torch.optim.AdamW)
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = name.endswith(("height_rel", "width_rel")) or ".norm" in name
        assert decay[id(parameter)] == (0.0 if spared else 0.05), name


def test_sgd_is_detectron2s():
    _, sgd = optimizer()
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_gradients_are_clipped_when_asked(name):
    model, clipped = optimizer(
        "SOLVER.OPTIMIZER", name, "SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    clipped.step()
    assert all(parameter.grad.norm() <= 1.01 for parameter in model.parameters())


def test_evaluation_is_cocos_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config("quick/mask_rcnn_halo_shapes", ["OUTPUT_DIR", str(tmp_path)])
    prepare_datasets(cfg)
    evaluator = Trainer.build_evaluator(cfg, "halodet_shapes_val")
    assert isinstance(evaluator, COCOEvaluator)
    evaluator.reset()
    nothing = Instances(
        (120, 160), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0), pred_classes=torch.zeros(0).long()
    )
    evaluator.process([{"image_id": 0}], [{"instances": nothing}])
    # the case in which Detectron2's faster evaluation stops with an error
    assert set(evaluator.evaluate()) == {"bbox"}


def test_nothing_is_evaluated_after_a_last_iteration_that_failed(shapes, tmp_path):
    """With several processes the others would not be there, and this one wait for them instead of saying why it ends."""
    keys = {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": "('halodet_shapes_val',)", "TEST.DETECTIONS_PER_IMAGE": 5}
    trainer = make_trainer(tmp_path, keys)
    trainer.model.register_forward_pre_hook(
        lambda *_: {}["a thing"] if trainer.iter == 1 and trainer.model.training else None
    )
    with pytest.raises(KeyError, match="a thing"):
        trainer.train()
    assert not (tmp_path / "inference").exists()
