"""compare.json of a run's folder: the settings that it was trained with, so that no other run is taken for it."""

from __future__ import annotations

import json

from halodet.benchmark.comparison.plan import Run
from halodet.config.keys import default_values
from halodet.errors import ConfigError
from halodet.utils.io import write_json

RECORD = "compare.json"
_TRAINED = ("metrics.json", "last_checkpoint", "model_*.pth")
_MAX_LISTED = 8


def check_record(run: Run) -> None:
    """Check that what the folder of a run contains was trained with the settings of the run.

    Keys that only one of both has count with their default value: a newer halodet may have more.

    Raises:
        ConfigError: it was not, or this is unknown.
    """
    if not any(path for pattern in _TRAINED for path in run.folder.glob(pattern)):
        return  # a run that failed at its start may be repeated with corrected options
    fix = f"Fix: give another --output, or delete {run.folder}."
    try:
        recorded = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError("not a mapping of settings")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run.folder / RECORD} does not say what the run was trained with: {error}. {fix}"
        ) from error
    defaults = default_values()
    differences = []
    for key in sorted(recorded.keys() | run.settings.keys()):
        old, new = (settings.get(key, str(defaults.get(key))) for settings in (recorded, run.settings))
        if old != new:
            differences.append(f"{key}: {old} -> {new}")
    if differences:
        more = f" and {len(differences) - _MAX_LISTED} more" if len(differences) > _MAX_LISTED else ""
        listed = ", ".join(differences[:_MAX_LISTED])
        raise ConfigError(f"{run.folder} contains a run with other settings: {listed}{more}. {fix}")


def write_record(run: Run) -> None:
    """Write the settings of a run to its folder, which is created."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / RECORD, run.settings, indent=1)
