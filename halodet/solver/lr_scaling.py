"""The linear scaling rule: a schedule written for one batch size, used with another."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def scale_to_batch(cfg: CfgNode, *, log: bool = True) -> CfgNode:
    """Fit the schedule to the batch, where SOLVER.REFERENCE_IMS_PER_BATCH says which batch it was written for.

    With k = IMS_PER_BATCH · GRAD_ACCUM_STEPS / REFERENCE_IMS_PER_BATCH the rates (BASE_LR, BASE_LR_END) are multiplied by k, and whatever is counted in
    iterations (MAX_ITER, STEPS, WARMUP_ITERS, the periods of checkpoints, evaluations and drawings) is divided by it, so that the run sees
    as many images as before. REFERENCE_IMS_PER_BATCH becomes the batch, so that nothing is scaled twice.

    Args:
        cfg: the run's config.
        log: tell of what was changed, in one line.

    Source: Goyal et al., Accurate, Large Minibatch SGD, 2017 (arXiv 1706.02677). It is a rule for SGD; with AdamW a rate that grows with
    the root of the batch is as common. Detectron2's own REFERENCE_WORLD_SIZE does the same with the number of processes, and changes the
    batch along with it.

    Raises:
        ValueError: both references are set, or one is not a batch; what to change.
    """
    reference = cfg.SOLVER.REFERENCE_IMS_PER_BATCH
    if reference < 0:
        raise ValueError(
            f"SOLVER.REFERENCE_IMS_PER_BATCH is {reference}, expected the images in a batch that the schedule is for, or 0 for none"
        )
    if reference and cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise ValueError(
            "SOLVER.REFERENCE_IMS_PER_BATCH and REFERENCE_WORLD_SIZE both scale the rate: set one of them to 0"
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
    solver.MAX_ITER = _scaled(solver.MAX_ITER, factor)
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / factor)
    solver.STEPS = tuple(_scaled(step, factor) for step in solver.STEPS)
    solver.CHECKPOINT_PERIOD = _scaled(solver.CHECKPOINT_PERIOD, factor)
    for key in ("EVAL_PERIOD", "VIS_PERIOD"):
        if cfg.TEST.get(key):
            cfg.TEST[key] = _scaled(cfg.TEST[key], factor)
    if log:
        logger.info(
            f"The batch is {batch} and the schedule for one of {reference}: BASE_LR is now {solver.BASE_LR:.6g} (times {factor:.4g}), "
            f"MAX_ITER {solver.MAX_ITER} (divided by it), STEPS {solver.STEPS}, WARMUP_ITERS {solver.WARMUP_ITERS}, "
            f"CHECKPOINT_PERIOD {solver.CHECKPOINT_PERIOD}, EVAL_PERIOD {cfg.TEST.EVAL_PERIOD}."
        )
    if frozen:
        cfg.freeze()
    return cfg


def _scaled(iterations: int, factor: float) -> int:
    return max(1, round(iterations / factor))
