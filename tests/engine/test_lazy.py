"""tools/lazyconfig_train_net.py: training, exact resume, evaluation, EMA and the demo on its output folder."""

import json
from pathlib import Path

from halodet.config.lazy import load_lazy_config
from halodet.engine.lazy import build_evaluator
from halodet.engine.nan_guard import NonFiniteError
from halodet.inference import Predictor

import pytest
import torch
import two_ranks
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from helpers import differences, noise, read_metrics, run_ranks
from small_run import TRAIN, VAL, register_tiny_shapes

pytestmark = pytest.mark.usefixtures("shapes")

CONFIG = f'''
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from halodet.config import config_dir
from halodet.models import get_variant

cfg = LazyConfig.load(str(config_dir() / "lazy/mask_rcnn_halo_h0.py"))
dataloader, lr_multiplier, model, optimizer, train = (
    cfg[key] for key in ("dataloader", "lr_multiplier", "model", "optimizer", "train")
)
del cfg
model.backbone.bottom_up.variant = L(get_variant)(name="H0", base_width=16, depths=(1, 1, 1, 1))
model.backbone.out_channels = 32
model.proposal_generator.head.in_channels = 32
for head in (model.roi_heads.box_head, model.roi_heads.mask_head):
    head.input_shape.channels = 32
model.roi_heads.box_head.fc_dims = [32, 32]
model.roi_heads.box_predictor.input_shape.channels = 32
model.roi_heads.mask_head.conv_dims = [32, 32]
model.roi_heads.num_classes = 6
model.roi_heads.box_predictor.test_score_thresh = 0.0
model.roi_heads.box_predictor.test_topk_per_image = 5
loader = dataloader.train.loader
loader.update(total_batch_size=2, num_workers=0)
loader.dataset.names, dataloader.test.dataset.names = "{TRAIN}", "{VAL}"
loader.mapper.instance_mask_format = "bitmask"
loader.mapper.augmentations[0].short_edge_length = (48, 64)
dataloader.test.num_workers = 0
dataloader.test.mapper.augmentations[0].short_edge_length = 48
lr_multiplier.warmup_length = 0.25
optimizer.lr = 0.002
train.update(max_iter=4, eval_period=0, seed=5)
train.checkpointer.period = 2
del loader, head
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(config, tool):
    """The tool with the tiny config: (output folder, further arguments) -> exit code."""

    def start(output, *arguments, file=config):
        register_tiny_shapes()
        return tool([f"--config-file={file}", *arguments, f"train.output_dir={output}"], "lazyconfig_train_net")

    return start


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory, shapes_folder):
    """The output folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shapes_folder)
        assert run(output, "train.ema.enabled=true") == 0
    return output


def test_a_run_writes_what_the_yaml_tool_writes(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "run.json", "metrics.json", "log.txt", "classes.json", "skipped.json"} <= names
    assert {"model_0000001.pth", "model_final.pth", "model_final_ema.pth", "inference", "inference_ema"} <= names
    written = {key: value for line in read_metrics(trained) for key, value in line.items()}
    assert written["total_loss"] > 0 and {"bbox/AP", "segm/AP", "ema/bbox/AP"} <= written.keys()
    assert [start["seed"] for start in json.loads((trained / "run.json").read_text())] == [5]


def test_a_resumed_run_is_bit_equal(run, trained, tmp_path):
    options = ("train.ema.enabled=true", "dataloader.train.loader.num_workers=1")
    assert run(tmp_path, *options, "train.checkpointer.max_to_keep=1") == 0
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    checkpoint = torch.load(trained / "model_0000001.pth", weights_only=False)
    torch.save(checkpoint, tmp_path / "model_0000001.pth")
    (tmp_path / "model_0000003.pth").unlink()
    assert run(tmp_path, "--resume", *options) == 0
    both = [torch.load(f / "model_final.pth", weights_only=False) for f in (trained, tmp_path)]
    for one in both:
        del one["trainer"]["hooks"]["ResumeState"]["started"]
    assert differences(*both) == []


def test_evaluation_repeats_the_results_with_detectron2s_checkpointer_too(run, config, trained, tmp_path):
    weights = trained / "model_final.pth"
    assert run(tmp_path, "--eval-only", f"train.init_checkpoint={weights}") == 0
    results = [(f / "inference/coco_instances_results.json").read_text() for f in (trained, tmp_path)]
    assert results[0] == results[1] and json.loads(results[0])[0]["score"] > 0
    lazy = load_lazy_config(str(config))
    model = instantiate(lazy.model).eval()
    left = DetectionCheckpointer(model).load(str(weights))
    assert "model" not in left
    ours = torch.load(weights, weights_only=False)["model"]
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items() if name in ours)


def test_eval_only_and_resume_evaluate_the_output_folder(run, trained):
    assert run(trained, "--eval-only", "--resume", "train.ema.enabled=true") == 0


@pytest.mark.parametrize("kind", ["py", "yaml"])
def test_the_demo_reads_the_output_folder(tool, config, trained, tmp_path, kind):
    file = config if kind == "py" else trained / "config.yaml"
    photo = "datasets/tiny/val/000000.png"
    weights = trained / "model_final.pth"
    arguments = [f"--config-file={file}", "--input", photo, "--output", str(tmp_path), "--confidence-threshold=0.01"]
    flags = ["--allow-unsafe-config"] if kind == "yaml" else []
    assert tool([*arguments, *flags, "--opts", f"train.init_checkpoint={weights}"], "demo") == 0
    found = json.loads((tmp_path / "detections.json").read_text())
    assert [c["name"] for c in found["categories"]][:2] == ["circle", "square"]
    assert found["annotations"] and all(a["bbox"][2] > 0 and a["score"] >= 0.01 for a in found["annotations"])


def test_the_predictor_equals_the_model_in_evaluation(config, trained):
    lazy = load_lazy_config(str(config), [f"train.init_checkpoint={trained / 'model_final.pth'}", "train.device=cpu"])
    predictor, image = Predictor(lazy), noise(60, 90)
    sample = lazy.dataloader.test.mapper
    resized = instantiate(sample.augmentations)[0].get_transform(image).apply_image(image)
    tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
    with torch.no_grad():
        expected = predictor.model([{"image": tensor, "height": 60, "width": 90}])[0]["instances"]
    found = predictor.predict(image)["instances"]
    assert len(found) and torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_a_users_json_sets_datasets_classes_and_mask_format(run, scenes, tmp_path, capfd):
    other = ("model.roi_heads.num_classes=80", "dataloader.train.loader.mapper.instance_mask_format=polygon")
    short = ("train.max_iter=2", "train.checkpointer.period=5")
    assert run(tmp_path, *scenes, *other, *short) == 0
    weights = tmp_path / "model_final.pth"
    assert len(torch.load(weights, weights_only=False)["model"]["roi_heads.box_predictor.cls_score.weight"]) == 7
    assert "bbox/AP" in {key for line in read_metrics(tmp_path) for key in line}
    assert [entry["name"] for entry in json.loads((tmp_path / "classes.json").read_text())][:2] == ["circle", "square"]
    train, val = scenes[:2], scenes[2:]
    start = f"train.init_checkpoint={weights}"
    assert run(tmp_path / "again", "--eval-only", *val, start, *other) == 0
    results = [tmp_path / folder / "inference/coco_instances_results.json" for folder in ("", "again")]
    assert results[0].read_text() == results[1].read_text() != "[]"
    capfd.readouterr()
    for flags, key in (((*train, "--eval-only", start), "--val-json"), (val, "--train-json"), (train[:1], "--train")):
        assert run(tmp_path / "mistake", *flags) == 2
        assert key in "".join(capfd.readouterr())
    assert run(tmp_path / "train alone", *train, *short) == 0
    assert not (tmp_path / "train alone" / "inference").exists()


def test_an_evaluation_matches_classes_by_name(run, scenes, trained, tmp_path, capfd):
    """Ids exchanged together with their annotations change nothing; a class that the model lacks is refused."""
    file, folder = (flag.partition("=")[2] for flag in scenes[2:])
    data = json.loads(Path(file).read_text())
    flags = ["--eval-only", f"--val-images={folder}"]
    weights = f"train.init_checkpoint={trained / 'model_final.pth'}"
    assert run(tmp_path / "same", *flags, f"--val-json={file}", weights) == 0
    other = {1: 2, 2: 1}
    data["categories"][0]["id"], data["categories"][1]["id"] = 2, 1
    for annotation in data["annotations"]:
        annotation["category_id"] = other.get(annotation["category_id"], annotation["category_id"])
    (tmp_path / "other.json").write_text(json.dumps(data))
    capfd.readouterr()
    assert run(tmp_path / "other", *flags, f"--val-json={tmp_path / 'other.json'}", weights) == 0
    results = [
        json.loads((tmp_path / name / "inference/coco_instances_results.json").read_text())
        for name in ("same", "other")
    ]
    truth = [json.loads((tmp_path / name / "data/user_val.json").read_text()) for name in ("same", "other")]
    assert results[0] == results[1] and truth[0] == truth[1]
    data["categories"][0]["name"] = "sphere"
    (tmp_path / "unknown.json").write_text(json.dumps(data))
    assert run(tmp_path / "unknown", *flags, f"--val-json={tmp_path / 'unknown.json'}", weights) == 2
    assert "sphere" in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["train.init_checkpoint=missing.pth"], "missing.pth"),
        (["dataloader.train.loader.dataset.names=no_such_dataset"], "no_such_dataset"),
        (["dataloader.train.loader.mapper.instance_mask_format=polygon"], "instance_mask_format"),
        (["model.roi_heads.num_classes=0.5"], "model"),
        (["--eval-only"], "--eval-only"),
        (["train.nan_guard.policy=ignore"], "ignore"),
        (["+train.amp.precision=fp8"], "train.amp.precision=fp8"),
    ],
)
def test_mistakes_are_one_message(run, tmp_path, capfd, arguments, key):
    assert run(tmp_path, *arguments) == 2
    printed = "".join(capfd.readouterr())
    assert len([line for line in printed.splitlines() if "ERROR" in line and key in line]) == 1, printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("*.pth"))


def test_a_non_finite_loss_stops_with_code_70(run, tmp_path):
    assert run(tmp_path, "optimizer.lr=1e30") == NonFiniteError.exit_code == 70


@pytest.mark.distributed
def test_two_ranks_train_and_a_batch_that_they_cannot_share_is_a_mistake(config, scenes, tmp_path):
    register_tiny_shapes()
    arguments = [f"--config-file={config}", *scenes, "train.max_iter=2", f"train.output_dir={tmp_path}"]
    codes, text = run_ranks(two_ranks.train_lazy, *arguments, printed=tmp_path / "printed.txt")
    assert codes == [0, 0], text
    assert json.loads((tmp_path / "run.json").read_text())[0]["processes"] == 2
    assert (tmp_path / "log.txt.rank1").exists()
    assert {"model_0000001.pth", "model_final.pth"} <= {path.name for path in tmp_path.iterdir()}
    uneven = [*arguments, "dataloader.train.loader.total_batch_size=3"]
    codes, text = run_ranks(two_ranks.train_lazy, *uneven, printed=tmp_path / "uneven.txt")
    assert codes == [2, 2] and text.count("total_batch_size=3") == 1 and "Traceback" not in text, text


@pytest.mark.parametrize(
    ("config", "keys", "expected"),
    [
        ("mask_rcnn_halo_h0", ["+model.roi_heads.box_predictor.test_topk_per_image=300"], 300),
        ("mask_rcnn_halo_h0", [], 100),
        ("cascade_mask_rcnn_halo_h0", ["+model.roi_heads.box_predictors.2.test_topk_per_image=250"], 250),
    ],
)
def test_the_evaluator_counts_all_detections_of_the_model(config, keys, expected, tmp_path):
    cfg = load_lazy_config(f"lazy/{config}.py", [*keys, f"train.output_dir={tmp_path}"])
    cfg.dataloader.test.dataset.names = VAL
    register_tiny_shapes()
    assert max(build_evaluator(cfg, "ema")._max_dets_per_image or [100]) == expected
