"""Runs of two processes: environment, gradients, norms, errors, evaluation, and restart by torchrun."""

import importlib.util
import json
from datetime import timedelta
from pathlib import Path

from halodet.engine.distributed import (
    DistEnv,
    check_shared,
    convert_sync_batchnorm,
    detect_dist_env,
    first_host,
    init_distributed,
    run_and_broadcast_errors,
    wait_for_all_ranks,
)
from halodet.errors import ConfigError

import pytest
import torch
import two_ranks
from detectron2.layers import get_norm
from helpers import dataset_flags, differences, run_ranks
from torch import nn

SCRIPT = Path(__file__).with_name("two_ranks.py")
TIMM = importlib.util.find_spec("timm") is not None
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29400",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
TRAIN = [
    "--config-file", "quick/mask_rcnn_halo_shapes", "MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "MODEL.HALONET.NORM", "BN",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "SEED", "3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("a-1.site.org,b", "a-1.site.org"),
        ("r[1-2]n[010-020]x", "r1n010x"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first


def test_environment_of_torchrun_and_srun():
    assert detect_dist_env({}) is None
    assert detect_dist_env(dict(TORCHRUN)) == DistEnv(5, 8, 1, 4)
    environ = dict(SLURM)
    assert detect_dist_env(environ) == DistEnv(5, 8, 1, 4)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("gpu03", "24562")
    environ = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}
    assert detect_dist_env(environ) and (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "7")
    environ = {**SLURM, **TORCHRUN}  # torchrun in a Slurm job
    assert detect_dist_env(environ) and environ["MASTER_ADDR"] == "gpu1"
    assert detect_dist_env({**TORCHRUN, "WORLD_SIZE": "1"}) is None
    assert detect_dist_env({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert detect_dist_env({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None  # a batch script outside of srun


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({**TORCHRUN, "RANK": "8"}, "rank=8"),
        ({**TORCHRUN, "RANK": "x"}, "'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "LOCAL_RANK"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "5,3"}, "--ntasks-per-node"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_STEP_TASKS_PER_NODE"),
    ],
)
def test_an_invalid_environment_is_one_error(environ, named):
    with pytest.raises(ConfigError, match=named) as error:
        detect_dist_env(environ)
    assert "\n" not in str(error.value)


def test_a_rendezvous_without_the_other_rank_times_out(monkeypatch):
    for name, value in {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")  # a free one
    with pytest.raises(ConfigError, match="127.0.0.1.*2 ranks"):
        init_distributed(DistEnv(0, 2, 0, 2), timedelta(seconds=2))


def test_one_process_needs_no_group():
    norm = nn.Sequential(get_norm("SyncBN", 4))
    assert type(convert_sync_batchnorm(norm)[0]) is nn.SyncBatchNorm
    assert run_and_broadcast_errors(lambda: 3) == [3]
    check_shared(["nowhere"])
    assert wait_for_all_ranks()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    codes, log = run_ranks(two_ranks.measure, folder, "timm" if TIMM else "", printed=folder / "printed.txt")
    assert codes == [0, 0], log
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder, flags of the data, and log of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("trained")
    data = dataset_flags(folder / "data", 5)  # which two processes cannot share evenly
    codes, log = run_ranks(
        two_ranks.train, *data, *TRAIN, "OUTPUT_DIR", str(folder / "run"), printed=folder / "printed.txt"
    )
    assert codes == [0, 0], log
    return folder / "run", data, log


@pytest.mark.distributed
class TestTwoRanks:
    def test_environment(self, found):
        assert [rank["env"] for rank in found] == [[0, 0, 2], [1, 1, 2]]

    def test_gradient_is_that_of_one_process_with_all_images(self, found):
        for rank in found:
            assert all(loss > 1e-5 for loss in rank["detector"]["losses"].values()), (
                "losses of 0 would compare as equal"
            )
            assert rank["detector"]["gradient"] < 3e-5, rank["detector"]

    def test_sync_bn_on_the_cpu_is_bn_of_one_process_with_all_images(self, found):
        for rank in found:
            assert rank["backbone"]["naive"] > 20 and rank["norms"] == ["NaiveSyncBatchNorm"]
            assert rank["backbone"]["gradient"] < 1e-10 and rank["backbone"]["running_mean"] < 1e-12, rank["backbone"]

    @pytest.mark.skipif(not TIMM, reason="timm is not installed")
    def test_timms_sync_bn_on_the_cpu(self, found):
        for rank in found:
            assert rank["timm"]["naive"] > 20 and rank["timm"]["gradient"] < 1e-10, rank["timm"]

    def test_buffers_are_those_of_rank_0(self, found):
        assert [rank["buffers"] for rank in found] == [1.0, 1.0]

    def test_an_error_of_one_rank_is_raised_on_all(self, found):
        for rank in found:
            assert rank["errors"]["values"] == ["checked", None] and rank["errors"]["error"] == "set it to 3"

    def test_waiting_ends_without_the_other_rank(self, found):
        assert found[0]["waiting"] == [True, False] and found[1]["waiting"][0]

    def test_training_writes_one_log_per_rank(self, trained):
        output, _, log = trained
        files = (
            "config.yaml",
            "model_final.pth",
            "metrics.json",
            "classes.json",
            "data/user_train.json",
            "log.txt.rank1",
        )
        assert all((output / name).is_file() for name in files)
        assert "Rank of current process: 1" in (output / "log.txt.rank1").read_text()
        assert log.count("Starting training from iteration 0") == 1 and log.count("6 classes: circle") == 1, log

    def test_evaluation_is_that_of_one_process(self, trained, train_net, tmp_path):
        output, data, log = trained
        weights = ["MODEL.WEIGHTS", output / "model_final.pth"]
        flags = [*data[2:], "--eval-only"]
        assert train_net(tmp_path, *weights, flags=flags, config=output / "config.yaml", tiny=()) == 0
        both = [json.loads((d / "inference/coco_instances_results.json").read_text()) for d in (output, tmp_path)]
        assert both[0] == both[1] and len(both[0]) > 50

    def test_a_killed_rank_is_restarted_and_resumes_bit_equal(self, trained, torchrun, tmp_path):
        output, data, _ = trained
        command = [SCRIPT, "train_killed", 3, *data, "--resume", *TRAIN, "OUTPUT_DIR", tmp_path]
        code, log = torchrun("--max-restarts", 1, *command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        assert code == 0 and "exitcode: -9" in log and "Starting training from iteration 2" in log, log
        final = [torch.load(d / "model_final.pth", weights_only=True) for d in (output, tmp_path)]
        different = [path for path in differences(*final) if not path.endswith(".started")]
        assert different == []

    def test_a_mistake_is_one_message(self, tmp_path):
        arguments = [*TRAIN, "OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.NO_KEY", "3"]
        codes, log = run_ranks(two_ranks.train, *arguments, printed=tmp_path / "printed.txt")
        assert codes == [2, 2] and log.count("SOLVER.NO_KEY") == 1 and "Traceback" not in log, log
