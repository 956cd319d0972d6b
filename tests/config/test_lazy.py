"""Every LazyConfig builds the model and the optimizer of its YAML twin; what load_lazy_config refuses."""

from halodet.config.defaults import config_dir
from halodet.config.lazy import is_lazy_config, load_lazy_config, set_score_threshold
from halodet.errors import ConfigError
from halodet.solver import build_optimizer

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from helpers import cached_config, noise

LAZY = sorted(path.stem for path in (config_dir() / "lazy").glob("*.py"))


def twin(name):
    """The config of the YAML file with the same name, or Cascade H4's with another variant."""
    cfg = cached_config(name if (config_dir() / f"{name}.yaml").is_file() else "cascade_mask_rcnn_halo_h4")
    cfg.defrost()
    if name.startswith("cascade_mask_rcnn_halo_h"):
        cfg.MODEL.HALONET.VARIANT = name[-2:].upper()
    return cfg


def on_meta(build, cfg):
    with torch.device("meta"):
        return build(cfg)


def load(name, *opts):
    return load_lazy_config(f"lazy/{name}.py", opts)


def test_the_configs_that_the_documentation_names():
    networks = [*(f"halo_h{i}" for i in range(8)), "halonet50ts"]
    assert {f"{kind}_{n}" for kind in ("mask_rcnn", "cascade_mask_rcnn") for n in networks} <= set(LAZY)
    assert {"mask_rcnn_r50_se_halo_b8h3", "mask_rcnn_r101_se_halo_b32h3", "mask_rcnn_haloregnetz_b"} <= set(LAZY)


@pytest.mark.parametrize("name", LAZY)
def test_model_and_hyperparameters_are_those_of_the_yaml_twin(name):
    lazy, cfg = load(name), twin(name)
    cfg.MODEL.DEVICE = "meta"
    model, expected = on_meta(instantiate, lazy.model), on_meta(build_model, cfg)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, expected)]
    assert shapes[0] == shapes[1]
    # Modules that have no parameters, and settings, are shown by their representation.
    assert str(model) == str(expected)
    assert lazy.model.input_format == cfg.INPUT.FORMAT == lazy.dataloader.test.mapper.image_format
    assert list(lazy.model.pixel_mean) == cfg.MODEL.PIXEL_MEAN and list(lazy.model.pixel_std) == cfg.MODEL.PIXEL_STD
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER and lazy.train.eval_period == cfg.TEST.EVAL_PERIOD
    resize = lazy.dataloader.train.loader.mapper.augmentations[0]
    assert tuple(resize.short_edge_length) == cfg.INPUT.MIN_SIZE_TRAIN and resize.max_size == cfg.INPUT.MAX_SIZE_TRAIN


@pytest.mark.parametrize("name", ["mask_rcnn_halo_h0", "mask_rcnn_halonet26t"])
def test_optimizer_and_schedule_are_those_of_the_yaml_twin(name):
    lazy, cfg = load(name), twin(name)
    cfg.MODEL.DEVICE = "meta"
    model, expected = on_meta(instantiate, lazy.model), on_meta(build_model, cfg)
    lazy.optimizer.params.model = model
    ours, theirs = instantiate(lazy.optimizer), build_optimizer(cfg, expected)
    assert type(ours) is type(theirs)

    def options(optimizer, model):
        names = {parameter: name for name, parameter in model.named_parameters()}
        keys = ("lr", "weight_decay", "momentum", "betas", "nesterov")
        return {
            names[p]: {key: group[key] for key in keys if key in group}
            for group in optimizer.param_groups
            for p in group["params"]
        }

    assert options(ours, model) == options(theirs, expected)
    multiplier, scheduler = instantiate(lazy.lr_multiplier), build_lr_scheduler(cfg, theirs)
    for iteration in (0, 500, 999, 1000, 59999, 60000, 80000, 89999):
        expected_rate = scheduler._multiplier(iteration / cfg.SOLVER.MAX_ITER)
        assert multiplier(iteration / lazy.train.max_iter) == pytest.approx(expected_rate, rel=1e-6), iteration


def test_losses_are_those_of_the_yaml_twin():
    options = ("model.backbone.bottom_up.norm=BN", "model.roi_heads.mask_head.conv_norm=BN", "model.backbone.norm=BN")
    keys = ("MODEL.HALONET.NORM", "MODEL.FPN.NORM", "MODEL.ROI_MASK_HEAD.NORM")
    lazy = load("mask_rcnn_halo_h0", *options)
    cfg = cached_config("mask_rcnn_halo_h0", "MODEL.DEVICE", "cpu", *(word for key in keys for word in (key, "BN")))
    target = Instances((96, 128), gt_boxes=Boxes([[10.0, 20, 60, 70]]), gt_classes=torch.tensor([3]))
    mask = torch.zeros(1, 96, 128, dtype=torch.bool)
    mask[:, 20:70, 10:60] = True
    target.gt_masks = BitMasks(mask)
    image = torch.as_tensor(noise(96, 128).transpose(2, 0, 1).copy())
    losses = []
    for build in (lambda: instantiate(lazy.model), lambda: build_model(cfg)):
        seed_all_rng(7)
        model = build().train()
        seed_all_rng(8)
        with EventStorage():
            losses.append(model([{"image": image, "instances": target, "height": 96, "width": 128}]))
    assert losses[0].keys() == losses[1].keys() and losses[0]["loss_mask"] > 0
    for key, value in losses[0].items():
        assert torch.equal(value, losses[1][key]), key


def test_overrides():
    lazy = load("mask_rcnn_halo_h1", "train.max_iter=7", "model.roi_heads.num_classes=3", "+train.note=hello")
    assert (lazy.train.max_iter, lazy.train.note) == (7, "hello")
    model = on_meta(instantiate, lazy.model)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    with pytest.raises(ConfigError, match=r"train\.max_itr.*train\.max_iter"):
        load("mask_rcnn_halo_h1", "train.max_itr=7")
    with pytest.raises(ConfigError, match="MAX_ITER"):
        load("mask_rcnn_halo_h1", "MAX_ITER", "7")
    with pytest.raises(ConfigError, match="override"):
        load("mask_rcnn_halo_h1", "train.max_iter=[")


def test_score_threshold_reaches_every_stage_of_a_cascade():
    lazy = load("cascade_mask_rcnn_halo_h0")
    set_score_threshold(lazy, 0.25)
    assert [p.test_score_thresh for p in lazy.model.roi_heads.box_predictors] == [0.25] * 3


def test_a_config_of_detectron2s_own_tool_gets_the_missing_values(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(
        "from detectron2 import model_zoo\n"
        "model = model_zoo.get_config('common/models/mask_rcnn_fpn.py').model\n"
        "dataloader = model_zoo.get_config('common/data/coco.py').dataloader\n"
        "optimizer = model_zoo.get_config('common/optim.py').SGD\n"
        "lr_multiplier = model_zoo.get_config('common/coco_schedule.py').lr_multiplier_1x\n"
        "train = dict(output_dir='elsewhere', max_iter=3)\n"
    )
    lazy = load_lazy_config(str(file))
    assert (lazy.train.output_dir, lazy.train.max_iter, lazy.train.nan_guard.policy) == ("elsewhere", 3, "stop")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model = dict(", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("1 / 0", "ZeroDivisionError"),
        ("model = dict(x=1)\ntrain = dict()", "dataloader"),
        ("", "model"),
    ],
)
def test_files_that_are_not_lazy_configs(tmp_path, text, key):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=key) as info:
        load_lazy_config(str(tmp_path / "broken.py"))
    assert "broken.py" in str(info.value)


def test_a_saved_config_is_read_only_if_it_is_trusted(tmp_path):
    path = tmp_path / "config.yaml"
    LazyConfig.save(load("mask_rcnn_halo_h0"), str(path))
    assert is_lazy_config(str(path)) and not is_lazy_config("mask_rcnn_halo_h0.yaml")
    with pytest.raises(ConfigError, match="--allow-unsafe-config"):
        load_lazy_config(str(path))
    saved = load_lazy_config(str(path), allow_unsafe=True)
    assert str(on_meta(instantiate, saved.model)) == str(on_meta(instantiate, load("mask_rcnn_halo_h0").model))
    with pytest.raises(ConfigError, match="mask_rcnn_halo_h0.yaml"):
        load_lazy_config("mask_rcnn_halo_h0.yaml")
