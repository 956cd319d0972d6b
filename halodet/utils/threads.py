"""CPU thread defaults, set in the environment before PyTorch is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_FILE = Path("/proc/self/cgroup")


def set_thread_defaults() -> None:
    """Set OpenMP defaults for shared and small machines; does nothing once PyTorch is imported.

    ``GOMP_SPINCOUNT=1000`` shortens the busy-waiting of idle threads, which slows down a machine with other load; a set
    ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` is kept. ``OMP_NUM_THREADS`` is set where a container's CPU quota is lower
    than the number of CPUs in the affinity mask (which OpenMP follows by itself); a set value is kept.
    """
    if "torch" in sys.modules:
        return
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"
    quota = cpu_quota()
    if quota is not None and quota < affinity_cpus():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(quota))))


def affinity_cpus() -> int:
    """Return the number of CPUs that the process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Return the CPU quota of the process in CPUs, or None if it has none (cgroup v1 and v2)."""
    quotas = []
    for line in _read(CGROUP_FILE).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUP_ROOT / "cpu" if controllers else CGROUP_ROOT
        group = root / path.lstrip("/")
        # Limits of ancestors apply too. Inside a container the path may be the host's; then only the root exists.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                quotas.append(_quota(folder))
    return min((quota for quota in quotas if quota), default=None)


def _quota(folder: Path) -> float | None:
    text = _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
    limit, _, period = text.strip().partition(" ")
    return int(limit) / int(period) if limit.isdecimal() and period.strip().isdecimal() and int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
