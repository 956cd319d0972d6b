"""Train one run in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from halodet.benchmark.comparison.plan import Run
from halodet.benchmark.comparison.record import write_record
from halodet.benchmark.comparison.results import BOX_AP, Result, read_result
from halodet.errors import ConfigError

CONSOLE = "console.txt"
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_LOGGED_ERROR = re.compile(r"ERROR \[.*?\]: (.*)")
_EXCEPTION = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Stopped)(?:: .*)?")


def train(run: Run, train_net: Path, flags: Sequence[str], lock: int | None) -> Result:
    """Train and evaluate a run, or resume it, and return its result.

    Its output is appended to console.txt in its folder. If this process is interrupted (KeyboardInterrupt, SystemExit),
    the run saves a checkpoint and ends first; at a second interruption it is killed.

    Args:
        run: the run.
        train_net: path of tools/train_net.py.
        flags: flags of tools/train_net.py.
        lock: file descriptor that the run inherits; see :func:`lock_folder`.
    """
    write_record(run)
    command = [sys.executable, str(train_net), "--config-file", str(run.config_file), "--resume", *flags, *run.options]
    log = run.folder / CONSOLE
    with log.open("ab") as console:
        start = console.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which ends the run with a checkpoint
            pass_fds=[] if lock is None else [lock],
        )
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if code == 0:
        result = read_result(run)
        return result or Result(run, reason=f"no {BOX_AP} of iteration {run.max_iter} in metrics.json", log=log)
    with log.open("rb") as console:
        console.seek(start)
        reason = last_error(console.read().decode(errors="replace"))
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}" + (f" after: {reason}" if reason else "")
    return Result(run, reason=reason or f"exit code {code}", log=log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    print("Stopping the current run with a checkpoint; press Ctrl-C again to kill it", flush=True)
    try:
        process.terminate()
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def last_error(text: str) -> str:
    """Return the last error of a log: a logged one or an exception, or else its last line."""
    lines = [line.strip() for line in _COLOR.sub("", text).splitlines() if line.strip()]
    for line in reversed(lines):
        logged = _LOGGED_ERROR.fullmatch(line)
        if logged or _EXCEPTION.fullmatch(line):
            return logged[1] if logged else line
    return lines[-1] if lines else ""


def lock_folder(folder: Path) -> int | None:
    """Lock a folder until this process and all that inherit the returned file descriptor have ended.

    A run that outlives a killed comparison is thus not started a second time. Without effect where the system has no
    such locks.

    Raises:
        ConfigError: the folder is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"--output {folder} is in use by another comparison, or by a training that outlived one. Fix: wait for it "
            "or end it, or give another --output."
        ) from error
    except OSError:  # a file system without locks
        pass
    return descriptor
