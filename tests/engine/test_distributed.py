"""Two processes learn, and count, as one does; measured by two_ranks.py in two processes that torchrun starts."""

import importlib.util
import json
from pathlib import Path

from halodet.engine import agree, check_shared
from halodet.engine.distributed import convert_sync_batchnorm, ddp_anywhere
from halodet.errors import ConfigError

import pytest
from detectron2.engine import defaults
from detectron2.layers import get_norm
from torch import nn

TIMM = importlib.util.find_spec("timm") is not None


@pytest.fixture(scope="module")
def found(torchrun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    code, log = torchrun(Path(__file__).with_name("two_ranks.py"), folder, *(["timm"] if TIMM else []))
    assert code == 0, log
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


def test_torchruns_processes_know_their_places(found):
    assert [(f["rank"], f["local_rank"], f["local_size"]) for f in found] == [(0, 0, 2), (1, 1, 2)]


def test_a_detectors_gradient_of_two_processes_is_that_of_one_with_all_images(found):
    for rank in found:
        assert all(loss > 1e-5 for loss in rank["detector"]["losses"].values()), "a loss of 0 would compare as equal"
        assert rank["detector"]["gradient"] < 3e-5, rank["detector"]


def test_sync_bn_of_two_processes_on_the_cpu_is_bn_of_one_with_all_images(found):
    for rank in found:
        assert rank["backbone"]["naive"] > 20
        assert rank["backbone"]["gradient"] < 1e-10 and rank["backbone"]["running_mean"] < 1e-12, rank["backbone"]
        assert rank["trainer_norms"] == ["NaiveSyncBatchNorm"]


@pytest.mark.skipif(not TIMM, reason="timm is not installed")
def test_timms_sync_bn_on_the_cpu_is_bn_of_one_with_all_images(found):
    for rank in found:
        assert rank["timm"]["naive"] > 20 and rank["timm"]["gradient"] < 1e-10, rank["timm"]


def test_buffers_are_rank_0s_before_an_evaluation(found):
    assert [rank["buffers"]["mean"] for rank in found] == [1.0, 1.0]


def test_one_processs_mistake_is_raised_in_all(found):
    assert all(rank["agreement"] == {"values": ["checked", None], "refused": "set it to 3"} for rank in found)


def test_alone_everything_is_as_without():
    norm = nn.Sequential(get_norm("SyncBN", 4))
    assert type(convert_sync_batchnorm(norm)[0]) is nn.SyncBatchNorm
    model = nn.Linear(2, 2)
    original = defaults.create_ddp_model
    with ddp_anywhere():
        assert defaults.create_ddp_model(model, broadcast_buffers=False) is model
    assert defaults.create_ddp_model is original
    assert agree(lambda: 3, True, (ConfigError,)) == [3]
    check_shared(["nowhere"])
