"""Where a process finds its place, and what the others do when one ends."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from halodet.data import write_shapes
from halodet.engine import EXIT_RANK_LOST, DistEnv, detect_dist_env, host_of, join
from halodet.engine.launch import first_host
from halodet.errors import ConfigError

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_NODELIST": "gpu[01-04]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
TINY = [
    "MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2",
    "DATALOADER.NUM_WORKERS", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.HALONET.NORM", "BN",
]  # fmt: skip


def flags(num_gpus=1, num_machines=1, machine_rank=0):
    return argparse.Namespace(num_gpus=num_gpus, num_machines=num_machines, machine_rank=machine_rank)


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
def test_the_first_machine_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


def test_a_process_finds_its_place():
    assert detect_dist_env(flags(), {}) is None
    assert detect_dist_env(flags(), TORCHRUN) == DistEnv("torchrun", 5, 8, 1, 4, "gpu1", 29400)
    assert detect_dist_env(flags(), SLURM) == DistEnv("Slurm", 5, 8, 1, 4, "gpu03", 24562)
    assert detect_dist_env(flags(), {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}) == DistEnv(
        "Slurm", 5, 8, 1, 4, "10.0.0.1", 7
    )
    assert detect_dist_env(flags(), {**SLURM, **TORCHRUN}).source == "torchrun"  # torchrun in a Slurm job
    assert detect_dist_env(flags(4, 2, 1), TORCHRUN).rank == 5  # flags that say the same
    few = {
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_JOB_ID": "1",
    }
    assert detect_dist_env(flags(), {**few, "SLURM_JOB_NUM_NODES": "2"}) == DistEnv("Slurm", 1, 2, 0, 1, "a", 20010)


def test_an_environment_of_one_process_is_none():
    one = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert detect_dist_env(flags(), one) is None
    assert detect_dist_env(flags(), {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    # a batch script that runs Detectron2's own launcher; a cluster that sets a rank of its own
    assert detect_dist_env(flags(num_gpus=4), {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert (
        detect_dist_env(flags(num_machines=2), {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
        is None
    )


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (
            flags(num_gpus=2),
            TORCHRUN,
            r"--num-gpus is 2, but torchrun has started 8 processes, 4 of them .* leave --num-gpus out",
        ),
        (flags(machine_rank=2), SLURM, r"--machine-rank is 2, but Slurm .* makes it 1"),
        (flags(), {**TORCHRUN, "RANK": "8"}, "rank 8 and local rank 1"),
        (flags(), {**TORCHRUN, "RANK": "x"}, "RANK is 'x', expected a whole number"),
        (
            flags(),
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            "but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT",
        ),
        (flags(), {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "5,3"}, "unevenly over gpu.* --ntasks-per-node"),
        (
            flags(),
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
            "SLURM_JOB_ID, SLURM_JOB_NODELIST is not set",
        ),
        # what a batch script has that does not write srun
        (
            flags(),
            {
                "SLURM_NTASKS": "4",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_JOB_NODELIST": "a",
                "SLURM_JOB_ID": "1",
            },
            "has 4 tasks, but its batch script has started this process without srun",
        ),
    ],
)
def test_what_contradicts_itself_is_one_sentence(arguments, environ, message):
    with pytest.raises(ConfigError, match=message) as error:
        detect_dist_env(arguments, environ)
    assert "\n" not in str(error.value)


def test_host_of_detectron2s_address():
    assert host_of("tcp://10.0.0.2:29500") == "10.0.0.2"
    assert host_of("auto") == host_of("file:///tmp/meeting") == socket.gethostname()


def test_processes_that_never_come_are_one_sentence(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # for what join sets to be undone
    with pytest.raises(
        ConfigError, match=rf"not all of Slurm's 2 processes met at 127.0.0.1:{port} within 0.05 minutes .* srun"
    ):
        join(DistEnv("Slurm", 0, 2, 0, 2, "127.0.0.1", port), "cpu", timedelta(seconds=3))


@pytest.mark.parametrize(
    ("how", "who", "why", "code"),
    [
        ("bug", 1, "KeyError: 'a thing'", 1),
        ("mistake", 0, "set it to 3", 2),
        ("kill", 1, "it was killed", -9),
        ("exit", 0, "it was killed", 9),
    ],
)
def test_when_a_process_ends_the_other_ends_with_its_reason(how, who, why, code):
    """Without torchrun, which would end the other one first."""
    started = start_slurm([sys.executable, str(Path(__file__).with_name("ending_rank.py")), how, str(who)])
    logs = [process.communicate(timeout=60)[0] for process in started]
    ended = time.time()
    assert f"rank {who} on {socket.gethostname()} ended: {why}" in logs[1 - who], logs
    assert [process.returncode for process in started][who] == code and started[1 - who].returncode == EXIT_RANK_LOST, (
        logs
    )
    assert ended - float(re.search(r"ending at (\S+)", logs[who]).group(1)) < 20


def test_a_mistake_that_both_find_is_told_once():
    started = start_slurm([sys.executable, str(Path(__file__).with_name("ending_rank.py")), "both", "1"])
    logs = [process.communicate(timeout=60)[0] for process in started]
    assert logs[0].count("set it to 3") == 1 and "rank 1 on" in logs[0], logs
    assert [process.returncode for process in started] == [EXIT_RANK_LOST, 2], logs


def test_a_port_in_use_is_one_sentence(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^port {port} of .* is in use by another program: set MASTER_PORT to a free one$"
        ):
            join(DistEnv("Slurm", 0, 2, 0, 2, "127.0.0.1", port), "cpu", timedelta(seconds=3))


def test_processes_that_torchrun_starts_again_meet_again(torchrun):
    code, log = torchrun("--max-restarts", 1, Path(__file__).with_name("ending_rank.py"), "kill", 1, timeout=120)
    assert code == 0 and log.count("ending at") == 1 and log.count("done") == 2, log


def test_processes_that_leave_together_keep_their_exit_code_when_slurm_ends_the_rest():
    """srun --kill-on-bad-exit sends SIGTERM to the others once the first has left."""
    started = start_slurm([sys.executable, str(Path(__file__).with_name("ending_rank.py")), "leave", "1"])
    assert started[1].wait(timeout=60) == 75
    started[0].send_signal(signal.SIGTERM)
    logs = [process.communicate(timeout=60)[0] for process in started]
    assert started[0].returncode == 75, logs


def start_slurm(command, **environment):
    """Start the two processes that srun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    environment = {
        **os.environ,
        **slurm,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env={**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_shapes(root, "train", 5)  # which two processes cannot share evenly
    return ["--train-json", root / "annotations/train.json", "--train-images", root / "train",
            "--val-json", root / "annotations/train.json", "--val-images", root / "train"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(torchrun, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    config = ["tools/train_net.py", "--config-file", "quick/mask_rcnn_halo_shapes", *data]
    code, log = torchrun(*config, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()", *TINY)
    assert code == 0, log
    return output, log


def test_torchrun_trains_and_each_process_logs(trained):
    output, log = trained
    for name in (
        "config.yaml",
        "model_final.pth",
        "metrics.json",
        "classes.json",
        "data/user_train.json",
        "log.txt",
        "log.txt.rank1",
    ):
        assert (output / name).is_file(), name
    assert "Rank of current process: 1. DistEnv size: 2" in (output / "log.txt.rank1").read_text()
    assert log.count("Starting training from iteration 0") == 1 and log.count("6 classes: circle") == 1, log


def test_two_processes_evaluate_exactly_as_one(trained, torchrun, data, tmp_path):
    output, _ = trained
    command = ["tools/train_net.py", "--eval-only", "--config-file", output / "config.yaml", *data[4:]]
    command += ["MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR"]
    code, log = torchrun(*command, tmp_path / "two")
    assert code == 0, log
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    one = subprocess.run(
        [sys.executable, *map(str, command), str(tmp_path / "one")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert one.returncode == 0, one.stdout + one.stderr
    folders = (output, tmp_path / "one", tmp_path / "two")
    training, alone, shared = (
        json.loads((folder / "inference/coco_instances_results.json").read_text()) for folder in folders
    )
    assert shared == alone and len(alone) > 50
    # while training too, although plain batch norm has gathered other statistics in the other process
    assert training == alone
    found = [re.findall(r"copypaste: [\d.,nan-]+", text) for text in (log, one.stdout)]
    assert found[0] == found[1] and len(found[0]) == 2


def test_a_mistake_is_told_once_and_ends_all(torchrun, tmp_path):
    command = ["tools/train_net.py", "--config-file", "quick/mask_rcnn_halo_shapes", "OUTPUT_DIR", tmp_path]
    code, log = torchrun(*command, "SOLVER.NO_KEY", 3)
    assert code == 1 and log.count("there is no config key SOLVER.NO_KEY") == 1, log
    code, log = torchrun(*command, "DATASETS.TRAIN", "('coco_2017_train',)", DETECTRON2_DATASETS=str(tmp_path))
    assert code == 1 and log.count("coco_2017_train was looked for at") == 1, log
