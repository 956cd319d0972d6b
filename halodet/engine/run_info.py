"""Record of a run's starts: command line, commit, versions and machine in run.json, and the config in config.yaml."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import halodet
from halodet.utils.io import write_json

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from omegaconf import DictConfig

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
_PACKAGES = ("detectron2", "torch", "torchvision", "timm", "numpy", "opencv-python", "pycocotools")


def start_run(cfg: CfgNode | DictConfig, args: argparse.Namespace, output_dir: str, seed: int) -> None:
    """Call Detectron2's ``default_setup`` and add this start to ``run.json`` in ``output_dir``; call it on all ranks.

    Afterwards ``--config-file config.yaml`` of that folder repeats the run. An evaluation does not overwrite the
    config.yaml of a training run.
    """
    output = Path(output_dir)
    config = output / "config.yaml"
    training_config = config.read_bytes() if args.eval_only and config.is_file() else None
    resumed = args.resume and (output / "last_checkpoint").is_file()
    comm.synchronize()
    default_setup(cfg, args)
    if comm.is_main_process():
        if training_config is not None:
            config.write_bytes(training_config)
        add_start(output / RUN_FILE, {"eval_only": args.eval_only, "resumed": resumed, "seed": seed})


def add_start(path: Path, entry: dict[str, Any]) -> None:
    """Append ``entry`` to the list in ``path``, with time, command line, commit, versions and machine.

    Raises:
        OSError: the file cannot be written; its previous version is unchanged.
    """
    starts: list[dict[str, Any]] = []
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
                raise ValueError("not a list of starts")
        except (OSError, ValueError):
            backup = path.with_suffix(".damaged.json")
            os.replace(path, backup)
            logger.warning("%s is unreadable; renamed it to %s and starting a new one", path, backup)
            starts = []
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "host": platform.node(),
        "processes": comm.get_world_size(),
        **entry,
        "git": git_state(Path(halodet.__file__).parent),
        "versions": {"halodet": halodet.__version__, **{name: _version(name) for name in _PACKAGES}},
        "environment": collect_env_info().splitlines(),
    }
    write_json(path, [*starts, start], indent=1)
    commit = (start["git"] or {}).get("commit", "unknown")
    message = "Recorded start %d in %s: halodet %s, commit %s, seed %s"
    logger.info(message, len(starts) + 1, path, halodet.__version__, commit, entry["seed"])


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout that tracks ``folder``, and whether it has changes; None without a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails if installed inside an unrelated repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
