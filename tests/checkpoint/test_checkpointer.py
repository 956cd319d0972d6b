"""Loading into detectors: what loads, what is an error, and that an error leaves the model unchanged."""

import logging
import pickle

from halodet.checkpoint import Checkpointer, checkpointer, io, latest_checkpoint, load_weights, read_weights
from halodet.data.bad_images import SkipTrackingLoader
from halodet.engine import Trainer
from halodet.errors import CheckpointError
from halodet.models import HaloNet

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import CreatesFile, cached_config
from safetensors.torch import save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

CONFIG = "mask_rcnn_halo_h0"
NORMS = ["MODEL.HALONET.NORM", "MODEL.FPN.NORM", "MODEL.ROI_MASK_HEAD.NORM"]
LIGHT = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "16",
    "MODEL.FPN.OUT_CHANNELS",
    "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "16",
]


def detector(config=CONFIG, *opts):
    return build_model(cached_config(config, *LIGHT, *opts))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file for each case: right, renamed prefix, other variant, no matching keys, half the keys, truncated, pickle
    with code, text."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(3)
    right = detector().state_dict()
    torch.save({"model": right}, folder / "right.pth")
    torch.save({"model": {f"encoder.{name}": value for name, value in right.items()}}, folder / "prefix.pth")
    torch.save({"model": HaloNet("H1").state_dict()}, folder / "variant.pth")
    torch.save({"model": {f"a{i}.weight": torch.ones(3, 3) for i in range(5)}}, folder / "strange.pth")
    torch.save({"model": dict(list(right.items())[::2])}, folder / "half.pth")
    whole = (folder / "right.pth").read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "code.pkl").write_bytes(pickle.dumps({"model": {"a": CreatesFile(str(folder / "marker"))}}))
    torch.save({"model": {"a": CreatesFile(str(folder / "marker"))}}, folder / "code.pth")
    (folder / "text.pth").write_text("<html>not found</html>")
    return folder


@pytest.mark.parametrize("name", ["right", "prefix"])
def test_files_that_load(files, name):
    source = torch.load(files / "right.pth", weights_only=True)["model"]
    model = detector()
    checkpointer = Checkpointer(model)
    checkpointer.load(str(files / f"{name}.pth"))
    assert all(
        torch.equal(value, source[key])
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    )
    assert checkpointer.report.share == checkpointer.report.model_share == 1.0
    assert ("removed prefix encoder." in str(checkpointer.report)) == (name == "prefix")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (
            "variant.pth",
            ["backbone.bottom_up.res2.0.conv3.conv.weight", "(64, 64, 1, 1)", "(32, 64, 1, 1)", "res4.7", "95.0 %"],
        ),
        (
            "strange.pth",
            [
                " 0.0 %",
                "missing in the file: backbone.bottom_up.stem",
                "a0.weight (3, 3), a1.weight (3, 3), a2.weight (3, 3)",
            ],
        ),
        ("half.pth", ["missing in the file: backbone."]),
        ("truncated.pth", ["truncated.pth"]),
        ("code.pkl", ["code.pkl"]),
        ("code.pth", ["code.pth"]),
        ("text.pth", ["text.pth"]),
        ("gone.pth", ["gone.pth"]),
    ],
)
def test_files_that_do_not_load(files, file, words):
    model = detector()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model).load(str(files / file))
    message = str(caught.value)
    assert file in message and "\n" not in message and all(word in message for word in words), message
    assert unchanged(model, before) and not (files / "marker").exists()


def test_a_file_without_a_matching_name_is_an_error_at_any_threshold(files):
    with pytest.raises(CheckpointError, match="strange.pth"):
        Checkpointer(detector(), min_loaded=0.0).load(str(files / "strange.pth"))
    checkpointer = Checkpointer(detector(), min_loaded=0.1)
    checkpointer.load(str(files / "half.pth"))
    assert 0.1 < checkpointer.report.share < 0.95


def test_a_checkpointer_can_load_after_it_refused(files):
    checkpointer = Checkpointer(detector())
    with pytest.raises(CheckpointError):
        checkpointer.load(str(files / "strange.pth"))
    checkpointer.load(str(files / "right.pth"))
    assert checkpointer.report.model_share == 1.0


def test_the_table_is_logged_once_in_place_of_warnings(files, caplog):
    propagate, logging.getLogger("halodet").propagate = logging.getLogger("halodet").propagate, True
    try:
        with caplog.at_level(logging.INFO):
            Checkpointer(detector(CONFIG, "MODEL.ROI_HEADS.NUM_CLASSES", "3"), min_loaded=0.5).load(
                str(files / "right.pth")
            )
    finally:
        logging.getLogger("halodet").propagate = propagate
    logged = [record for record in caplog.records if "roi_heads" in record.getMessage()]
    assert (
        len(logged) == 1
        and logged[0].name.startswith("halodet.checkpoint")
        and "proposal_generator" in logged[0].getMessage()
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_detectron2s_query_and_nothing_else(files, tmp_path):
    state = detector().state_dict()
    torch.save({name.removeprefix("backbone."): value for name, value in state.items()}, tmp_path / "ends.pth")
    with pytest.raises(CheckpointError):
        Checkpointer(detector()).load(str(tmp_path / "ends.pth"))
    checkpointer = Checkpointer(detector())
    checkpointer.load(f"{tmp_path / 'ends.pth'}?matching_heuristics=True")
    assert checkpointer.report.model_share == 1.0
    with pytest.raises(CheckpointError, match="color"):
        checkpointer.load(f"{tmp_path / 'ends.pth'}?color=red")


def test_a_run_resumes_only_from_all_of_its_model(files, tmp_path):
    class Counter:
        value = 0

        def state_dict(self):
            return {"value": self.value, "iteration": 9, "_trainer": {"optimizer": {}}}

        def load_state_dict(self, state):
            self.value = state["value"]

    source, counter = detector(), Counter()
    counter.value = 7
    Checkpointer(source, str(tmp_path), trainer=counter).save("model_0000009", iteration=9)
    model, fresh = detector(), Counter()
    checkpointer = Checkpointer(model, str(tmp_path), trainer=fresh)
    rest = checkpointer.resume_or_load("", resume=True)
    assert rest["iteration"] == 9 and fresh.value == 7 and not checkpointer.exact
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    data = torch.load(tmp_path / "model_0000009.pth", weights_only=True)
    data["model"].pop("roi_heads.mask_head.predictor.bias")
    torch.save(data, tmp_path / "model_0000009.pth")
    model = detector()
    before, fresh = snapshot(model), Counter()
    with pytest.raises(CheckpointError, match="1 of .*roi_heads.mask_head.predictor.bias"):
        Checkpointer(model, str(tmp_path), trainer=fresh).resume_or_load("", resume=True)
    assert unchanged(model, before) and fresh.value == 0
    Checkpointer(model, str(tmp_path)).resume_or_load(str(tmp_path / "model_0000009.pth"), resume=False)


def test_a_preloaded_checkpoint_is_not_read_again(tmp_path, monkeypatch):
    class State:
        def state_dict(self):
            return {"iteration": 9, "_trainer": {"optimizer": {}}}

        def load_state_dict(self, state):
            self.state = state

    source = detector()
    Checkpointer(source, str(tmp_path), trainer=State()).save("model_0000009")
    file = str(tmp_path / "model_0000009.pth")
    latest, weights = latest_checkpoint(tmp_path), read_weights(file)
    for module in (io, checkpointer):
        monkeypatch.setattr(module, "read_checkpoint", lambda *_, **__: pytest.fail("read again"))
    for load in (
        lambda model: load_weights(model, file, preloaded=weights),
        lambda model: Checkpointer(model, preloaded=weights).resume_or_load(file, resume=False),
        lambda model: Checkpointer(model, str(tmp_path), preloaded=latest, trainer=State()).resume_or_load(""),
    ):
        model = detector()
        load(model)
        assert unchanged(model, source.state_dict())


def test_batch_norms_without_statistics_are_refused_although_they_are_few_parameters(tmp_path):
    state = {name: value for name, value in detector().state_dict().items() if ".running_" not in name}
    torch.save({"model": state}, tmp_path / "no_statistics.pth")
    with pytest.raises(CheckpointError, match="99.. %.*running_mean"):
        Checkpointer(detector()).load(str(tmp_path / "no_statistics.pth"))


def test_metadata_is_saved_with_the_tensors(tmp_path):
    pixels = {"input_format": "BGR", "pixel_mean": "103.53 116.28 123.675", "pixel_std": "57.375 57.12 58.395"}
    Checkpointer(
        detector(CONFIG, "MODEL.HALONET.BLOCK_SIZE", "12", "MODEL.HALONET.HALO_SIZE", "2"), str(tmp_path)
    ).save("b12h2", iteration=3)
    saved = torch.load(tmp_path / "b12h2.pth", weights_only=True)
    assert saved["metadata"] == {**pixels, "block_size": "12", "halo_size": "2"} and saved["iteration"] == 3
    checkpointer = Checkpointer(detector(CONFIG, "MODEL.HALONET.BLOCK_SIZE", "10"))  # a window of 16 as well
    checkpointer.load(str(tmp_path / "b12h2.pth"))
    assert "from block_size=12, halo_size=2" in str(checkpointer.report)
    Checkpointer(detector("mask_rcnn_r50"), str(tmp_path)).save("r50")
    assert torch.load(tmp_path / "r50.pth", weights_only=True)["metadata"] == pixels


def test_another_channel_order_is_an_error_in_evaluation_and_adapted_in_training(tmp_path):
    model = detector(CONFIG)
    Checkpointer(model, str(tmp_path)).save("bgr")
    rgb = [
        "INPUT.FORMAT",
        "RGB",
        "MODEL.PIXEL_MEAN",
        "[123.675, 116.28, 103.53]",
        "MODEL.PIXEL_STD",
        "[58.395, 57.12, 57.375]",
    ]
    other = detector(CONFIG, *rgb)
    with pytest.raises(
        CheckpointError,
        match=r"bgr.pth .*INPUT.FORMAT BGR.*PIXEL_MEAN \[103.53.*RGB, \[123.675",
    ):
        load_weights(other, str(tmp_path / "bgr.pth"))
    Checkpointer(other).load(str(tmp_path / "bgr.pth"))
    stems = [m.backbone.bottom_up.stem.conv1.conv.weight for m in (model, other)]
    torch.testing.assert_close(stems[1], stems[0].flip(1))


def test_a_state_of_another_optimizer_is_an_error(tmp_path):
    def optimizer(model, groups):
        parameters = list(model.parameters())
        return torch.optim.SGD([{"params": parameters[i::groups]} for i in range(groups)], lr=0.1)

    source, model = detector(), detector()
    Checkpointer(source, str(tmp_path), optimizer=optimizer(source, 1)).save("model_0000001")
    with pytest.raises(CheckpointError, match="model_0000001.pth .*parameter group") as caught:
        Checkpointer(model, str(tmp_path), optimizer=optimizer(model, 2)).load(str(tmp_path / "model_0000001.pth"))
    assert "\n" not in str(caught.value)


def test_what_it_saves_detectron2_reads(tmp_path):
    source, model = detector(), detector()
    Checkpointer(source, str(tmp_path)).save("model_final")
    DetectionCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    assert unchanged(model, snapshot(source))


def test_evaluation_takes_safetensors_and_no_less_than_all(tmp_path):
    source, model = detector(), detector()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    report = load_weights(model, str(tmp_path / "model.safetensors"))
    assert unchanged(model, snapshot(source)) and report.model_share == 1.0
    save_file(source.backbone.bottom_up.state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="backbone.safetensors"):
        load_weights(model, str(tmp_path / "backbone.safetensors"))
    assert load_weights(model, str(tmp_path / "backbone.safetensors"), min_loaded=0.99).share == 1.0
    with pytest.raises(CheckpointError, match="pos_embed"):  # another halo is another model
        load_weights(detector(CONFIG, "MODEL.HALONET.HALO_SIZE", "2"), str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS"):
        load_weights(model, "")


def test_pickles_that_may_run_code_are_read_when_trusted(files, tmp_path):
    (tmp_path / "code.pkl").write_bytes(
        pickle.dumps({"model": {"a": CreatesFile(str(tmp_path / "marker"))}, "__author__": "x"})
    )
    with pytest.raises(CheckpointError):  # it is no tensor, but it did run: this is what the flag allows
        load_weights(detector(), str(tmp_path / "code.pkl"), allow_pickle=True)
    assert (tmp_path / "marker").exists()


def test_a_model_in_distributed_data_parallel_is_filled(files):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(detector(CONFIG, *(opt for key in NORMS for opt in (key, "BN"))))
        checkpointer = Checkpointer(model)
        checkpointer.load(str(files / "right.pth"))
        source = torch.load(files / "right.pth", weights_only=True)["model"]
        assert unchanged(model.module, source) and checkpointer.report.model_share == 1.0
    finally:
        distributed.destroy_process_group()


class NoImages(list):
    """Replaces the training data."""

    fingerprint, seed = "0 images", 0


def test_the_trainer_loads_and_saves_through_it(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "build_train_loader", classmethod(lambda cls, cfg: SkipTrackingLoader(NoImages())))
    opts = [
        "OUTPUT_DIR",
        str(tmp_path),
        "MODEL.WEIGHTS",
        str(files / "variant.pth"),
        "MODEL.HALONET.NORM",
        "BN",
        "DATASETS.TEST",
        "()",
    ]
    cfg = cached_config(CONFIG, *LIGHT, *opts)
    trainer = Trainer(cfg)
    hook = next(hook for hook in trainer._hooks if hasattr(hook, "checkpointer"))
    assert isinstance(trainer.checkpointer, Checkpointer) and hook.checkpointer is trainer.checkpointer
    before = snapshot(trainer.model)
    with pytest.raises(CheckpointError, match="variant.pth"):
        trainer.resume_or_load(resume=True)
    assert unchanged(trainer.model, before)
    assert trainer.checkpointer.min_loaded == 0.95 and not trainer.checkpointer.allow_pickle
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "last_checkpoint").exists()
    assert Trainer(cfg, allow_pickle=True).checkpointer.allow_pickle
