"""Stands in for tools/train_net.py: writes metrics.json at once, with an AP that depends on seed and learning rate."""

import json
import os
import signal
import sys
import time
from pathlib import Path

AP = {(1, "0.1"): 10.0, (2, "0.1"): 12.0, (3, "0.1"): 17.0, (1, "0.2"): 20.0, (2, "0.2"): 21.0, (3, "0.2"): 25.0}

options = dict(zip(sys.argv[-4::2], sys.argv[-3::2], strict=True))
folder, seed = Path(options["OUTPUT_DIR"]), int(options["SEED"])
rate = sys.argv[sys.argv.index("SOLVER.BASE_LR") + 1] if "SOLVER.BASE_LR" in sys.argv else "0.1"
with (folder / "starts.txt").open("a") as starts:
    print(*sys.argv[1:], file=starts)


def save_and_exit(*_):
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    sys.exit(75)


def write(**metrics):
    with (folder / "metrics.json").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


if "bad" in folder.parts:
    print("\x1b[31mERROR\x1b[0m [11/29 10:00:00 halodet.engine.main]: no such mixer\nsome last words")
    sys.exit(2)
if "killed" in folder.parts:
    signal.raise_signal(signal.SIGKILL)
if "silent" in folder.parts:
    sys.exit(0)
if {"hangs", "stubborn"} & set(folder.parts) and not (folder / "last_checkpoint").exists():
    signal.signal(signal.SIGTERM, save_and_exit if "hangs" in folder.parts else signal.SIG_IGN)
    write(iteration=2, time=9.0, memory_mib=700.0)
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
write(iteration=1, time=9.0, memory_mib=100.0, **{"bbox/AP": 99.0})
write(iteration=3, time=0.5 + seed, memory_mib=100.0 + seed, total_loss=1.0)
write(iteration=4, **{"bbox/AP": AP[seed, rate], "segm/AP": AP[seed, rate] / 4})
