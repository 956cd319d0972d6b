#!/usr/bin/env python3
"""Train on two hosts, each a network namespace of this machine: to the end, with one host killed, with the cable between them cut.

Needs root, Linux, iproute2 and util-linux. Both hosts run on the CPU. Prints one line for each of the three, and exits with 1 if one of
them is not as it should be: a run ends with its evaluation, and the end of one host ends the other within a minute, naming it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from halodet.data import write_shapes

ROOT = Path(__file__).resolve().parents[1]
HOSTS = {"hosta": "10.213.7.1", "hostb": "10.213.7.2"}
TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.HALONET.BASE_WIDTH", "16",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()",
    "DATALOADER.NUM_WORKERS", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
]  # fmt: skip


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def connect() -> None:
    """Make the two namespaces and a cable between them."""
    for host in HOSTS:
        ip("netns", "add", f"halodet-{host}")
    ip(
        "link",
        "add",
        "hosta",
        "netns",
        "halodet-hosta",
        "type",
        "veth",
        "peer",
        "name",
        "hostb",
        "netns",
        "halodet-hostb",
    )
    for host, address in HOSTS.items():
        for words in (f"addr add {address}/24 dev {host}", f"link set {host} up", "link set lo up"):
            ip("-n", f"halodet-{host}", *words.split())


def disconnect() -> None:
    for host in HOSTS:
        kill(host)
        subprocess.run(["ip", "netns", "del", f"halodet-{host}"], capture_output=True)


def kill(host: str) -> None:
    """End all that runs on a host at once, as a loss of power does."""
    found = subprocess.run(["ip", "netns", "pids", f"halodet-{host}"], capture_output=True, text=True).stdout
    for pid in map(int, found.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def training(host: str) -> list[str]:
    """The command lines of the run's processes on a host, torchrun's own left out."""
    lines = []
    for pid in subprocess.run(
        ["ip", "netns", "pids", f"halodet-{host}"], capture_output=True, text=True
    ).stdout.split():
        with suppress(OSError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return [line for line in lines if "tools/train_net.py" in line and "torch.distributed.run" not in line]


def start(folder: Path, data: list[object], iterations: int) -> dict[str, subprocess.Popen[bytes]]:
    """Start the run on both hosts; each one's output goes to HOST.txt in ``folder``."""
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in HOSTS.items())
    )
    processes = {}
    train = [
        "tools/train_net.py",
        "--config-file",
        "quick/mask_rcnn_halo_shapes",
        *data,
        "OUTPUT_DIR",
        folder / "out",
        *TINY,
    ]
    train += ["SOLVER.MAX_ITER", iterations]
    for host, address in HOSTS.items():
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
            "--rdzv-id", folder.name, "--rdzv-endpoint", f"{HOSTS['hosta']}:29400", "--local-addr", address,
        ]  # fmt: skip
        own = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'  # torchrun looks its host's name up
        named = ["unshare", "--uts", "--mount", "sh", "-c", own, folder / "hosts", host]
        command = ["ip", "netns", "exec", f"halodet-{host}", *named, *torchrun, *train]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host, "CUDA_VISIBLE_DEVICES": ""}
        with (folder / f"{host}.txt").open("wb") as log:
            processes[host] = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
            )
    return processes


def wait_for(file: Path, text: str, seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while text not in (file.read_text(errors="replace") if file.is_file() else ""):
        if time.monotonic() > until:
            raise TimeoutError(f"{file} does not come to {text!r} within {seconds:g} seconds")
        time.sleep(0.2)


def complete(folder: Path, data: list[object]) -> bool:
    codes = [process.wait(timeout=400) for process in start(folder, data, 4).values()]
    log = (folder / "hosta.txt").read_text(errors="replace")
    lines = [line for line in log.splitlines() if "copypaste: " in line and "," in line]
    good = codes == [0, 0] and (folder / "out/log.txt.rank1").is_file() and bool(lines)
    print(
        f"trained and evaluated on two hosts: exit codes {codes}, {len(lines)} lines of results"
        if good
        else log[-4000:],
        flush=True,
    )
    return good


def lose(folder: Path, data: list[object], how: str) -> bool:
    """Lose host b, and measure until nothing of the run is left on either host."""
    processes = start(folder, data, 1_000_000)
    wait_for(folder / "out/metrics.json", "total_loss")
    begin = time.monotonic()
    if how == "cut off":
        ip("-n", "halodet-hostb", "link", "set", "hostb", "down")
    else:
        kill("hostb")
    took: dict[str, float] = {}
    while len(took) < 2 * len(HOSTS) and time.monotonic() < begin + 75:
        for host, process in processes.items():
            if not training(host):
                took.setdefault(f"training on {host}", time.monotonic() - begin)
            if process.poll() is not None:
                took.setdefault(f"torchrun on {host}", time.monotonic() - begin)
        time.sleep(0.1)
    logs = [(folder / f"{host}.txt").read_text(errors="replace") for host in HOSTS]
    told = [line.strip() for log in logs for line in log.splitlines() if " ended: " in line]
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in took.items())
    print(f"host b {how}: {seconds}; {told[0] if told else 'nothing was said'}", flush=True)
    # torchrun itself waits longer for an answer on a host that is cut off from the one it meets the others on
    return bool(told) and all(took.get(f"training on {host}", 60.0) < 60.0 for host in HOSTS)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if os.geteuid() != 0:
        print("network namespaces are made by root: run this as root")
        return 2
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_shapes(root, "train", 5)
        train = ["--train-json", root / "annotations/train.json", "--train-images", root / "train"]
        val = ["--val-json", root / "annotations/train.json", "--val-images", root / "train"]
        good = []
        for number, step in enumerate((complete, lambda *a: lose(*a, "killed"), lambda *a: lose(*a, "cut off"))):
            try:
                connect()
                good.append(step(root / f"run{number}", train + (val if number == 0 else [])))
            finally:
                disconnect()
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
