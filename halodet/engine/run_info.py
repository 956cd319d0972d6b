"""What a run was started with: its config kept, and versions, command line and commit recorded."""

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
from halodet.errors import CheckpointWriteError
from halodet.utils.io import write_json

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


def start_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's ``default_setup``, after which ``--config-file OUTPUT_DIR/config.yaml`` repeats the run; called in each process.

    An evaluation leaves the config.yaml of a run that trained as it was. The start is added to OUTPUT_DIR/run.json.
    """
    output = Path(cfg.OUTPUT_DIR)
    config = output / "config.yaml"
    trained = config.read_bytes() if args.eval_only and config.is_file() else None
    resumed = args.resume and (output / "last_checkpoint").is_file()
    comm.synchronize()
    default_setup(cfg, args)
    if comm.is_main_process():
        if trained is not None:
            config.write_bytes(trained)
        add_start(output / RUN_FILE, {"eval_only": args.eval_only, "resumed": resumed, "seed": cfg.SEED})


def add_start(path: Path, entry: dict[str, Any]) -> None:
    """Add ``entry`` to the list in ``path``, with the time, the command line, and everything that computes.

    Raises:
        CheckpointWriteError: the file cannot be written.
    """
    starts = _starts(path)
    if starts is None:
        damaged = path.with_suffix(".damaged.json")
        os.replace(path, damaged)
        logger.warning(f"{path} is no list of starts: it is now {damaged}, and a new one begins.")
    starts = [*(starts or []), _described(entry)]
    try:
        write_json(path, starts, indent=1)
    except OSError as error:
        raise CheckpointWriteError(f"{path} cannot be written ({error.strerror or error}).") from error
    commit = (starts[-1]["git"] or {}).get("commit", "none")
    logger.info(
        f"Start {len(starts)} is recorded in {path}: halodet {halodet.__version__}, commit {commit}, seed {entry['seed']}."
    )


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of the checkout that ``folder`` is a tracked part of, and whether files differ from it; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # A package installed below somebody's repository is no part of it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _described(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "host": platform.node(),
        "processes": comm.get_world_size(),
        **entry,
        "git": git_state(Path(halodet.__file__).parent),
        "versions": {
            "halodet": halodet.__version__,
            **{
                name: _version(name)
                for name in ("detectron2", "torch", "torchvision", "timm", "numpy", "opencv-python", "pycocotools")
            },
        },
        "environment": collect_env_info().splitlines(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _starts(path: Path) -> list[dict[str, Any]] | None:
    """The entries of ``path``; none where there is no file yet, None where it holds anything else."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return None
    return starts if isinstance(starts, list) and all(isinstance(start, dict) for start in starts) else None
