"""The linear scaling rule: use a schedule that was written for one batch size with another."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def scale_to_batch(cfg: CfgNode, *, log: bool = True) -> CfgNode:
    """Scale the schedule from SOLVER.REFERENCE_IMS_PER_BATCH to the batch size of the run.

    With k = IMS_PER_BATCH * GRAD_ACCUM_STEPS / REFERENCE_IMS_PER_BATCH, learning rates (BASE_LR, BASE_LR_END) are
    multiplied by k, and numbers of iterations (MAX_ITER, STEPS, WARMUP_ITERS, the periods of checkpoints, evaluation
    and visualization) are divided by k, so that the run sees the same number of images. REFERENCE_IMS_PER_BATCH becomes
    the batch size of the run, so that a saved config is not scaled again.

    Args:
        cfg: config of the run; it is not changed.
        log: whether to log the changes.

    Raises:
        ValueError: REFERENCE_IMS_PER_BATCH is negative, or REFERENCE_WORLD_SIZE is set too.

    Source: Goyal et al., Accurate, Large Minibatch SGD, 2017 (arXiv 1706.02677). The rule is for SGD; with AdamW,
    scaling by the square root of k is as common. Detectron2's REFERENCE_WORLD_SIZE does the same for the number of
    processes, and changes the batch size too.
    """
    reference = cfg.SOLVER.REFERENCE_IMS_PER_BATCH
    if reference < 0:
        raise ValueError(f"SOLVER.REFERENCE_IMS_PER_BATCH={reference} is invalid: expected a batch size, or 0 for none")
    if reference and cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise ValueError(
            f"SOLVER.REFERENCE_IMS_PER_BATCH={reference} and REFERENCE_WORLD_SIZE={cfg.SOLVER.REFERENCE_WORLD_SIZE} "
            "are invalid: expected at most one of them. Fix: set one to 0"
        )
    batch = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.GRAD_ACCUM_STEPS
    if not reference or batch == reference:
        return cfg
    frozen, factor = cfg.is_frozen(), batch / reference
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    solver.REFERENCE_IMS_PER_BATCH = batch
    solver.BASE_LR *= factor
    solver.BASE_LR_END *= factor
    solver.MAX_ITER = _scale(solver.MAX_ITER, factor)
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / factor)
    solver.STEPS = tuple(_scale(step, factor) for step in solver.STEPS)
    solver.CHECKPOINT_PERIOD = _scale(solver.CHECKPOINT_PERIOD, factor)
    for key in ("EVAL_PERIOD", "VIS_PERIOD"):
        if cfg.TEST.get(key):
            cfg.TEST[key] = _scale(cfg.TEST[key], factor)
    if log:
        logger.info(
            "Scaled the schedule from batch size %d to %d: BASE_LR=%.6g MAX_ITER=%d STEPS=%s WARMUP_ITERS=%d "
            "CHECKPOINT_PERIOD=%d EVAL_PERIOD=%d",
            reference,
            batch,
            solver.BASE_LR,
            solver.MAX_ITER,
            solver.STEPS,
            solver.WARMUP_ITERS,
            solver.CHECKPOINT_PERIOD,
            cfg.TEST.EVAL_PERIOD,
        )
    if frozen:
        cfg.freeze()
    return cfg


def _scale(iterations: int, factor: float) -> int:
    return max(1, round(iterations / factor))
