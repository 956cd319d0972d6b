"""What has changed in a run's config since the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode

# Nothing of what is trained depends on these.
_FREE = (
    "OUTPUT_DIR", "VERSION", "VIS_PERIOD", "SEED", "DATASETS.TEST", "TEST.", "WANDB.", "DATALOADER.NUM_WORKERS", "DATALOADER.MAX_BAD_IMAGES",
    "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "MODEL.WEIGHTS", "SOLVER.CHECKPOINT_", "SOLVER.REFERENCE_", "SOLVER.NON_FINITE_POLICY",
)  # fmt: skip
# The optimizer's own state has them, and that is the checkpoint's.
_KEPT = ("BASE_LR", "WEIGHT_DECAY", "MOMENTUM", "NESTEROV", "BIAS_LR_FACTOR", "BACKBONE_MULTIPLIER", "LR_LAYER_DECAY")
_KEPT = tuple(f"SOLVER.{key}" for key in (*_KEPT, "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS", "WEIGHT_DECAY_REL_POS"))
_NAMED = 12


def settings(cfg: CfgNode) -> dict[str, str]:
    """Each key that training depends on, with its value as text."""
    return {key: value for key, value in _flat(cfg).items() if not key.startswith(_FREE)}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """One sentence on the keys of which both have a value, and not the same; None where there is none."""
    other = [key for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]
    if not other:
        return None
    told = ", ".join(f"{key} {before[key]} is now {now[key]}" for key in other[:_NAMED])
    told += f" and {len(other) - _NAMED} more" if len(other) > _NAMED else ""
    kept = [key for key in other if key in _KEPT]
    held = f"; {', '.join(kept)}: the checkpoint's stay, to change them begin anew with MODEL.WEIGHTS" if kept else ""
    return f"The run goes on with another config than its checkpoint was written with: {told}{held}."


def _flat(cfg: CfgNode, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in cfg.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": str(value)}
    return found
