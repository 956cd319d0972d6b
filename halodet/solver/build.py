"""The optimizer: SGD or AdamW, with a learning rate multiplier for the backbone and layer-wise learning rate decay."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from halodet.mixers import Mixer

import detectron2.solver
import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups
from tabulate import tabulate
from torch import nn

logger = logging.getLogger(__name__)

OPTIMIZERS = ("SGD", "AdamW")
_END = 1 - 2e-6  # just below 1; fvcore adds 1e-6
# prefixes of the bottom-up network's parameters, with an FPN and without
_PREFIXES = ("backbone.bottom_up.", "backbone.")
# HaloNet and Detectron2's ResNets: stem, res2.0, ...; timm's networks of blocks: stem, stages.0.0, ...
_LAYER = re.compile(r"(stem|res\d+\.\d+|stages\.\d+\.\d+)\.")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer SOLVER.OPTIMIZER_NAME with :func:`get_optimizer_params`; log its parameter groups.

    Raises:
        ValueError: ``model`` has no backbone or layers that BACKBONE_LR_MULTIPLIER or LR_LAYER_DECAY could apply to.
    """
    solver = cfg.SOLVER
    groups = get_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        weight_decay_rel_pos=solver.WEIGHT_DECAY_REL_POS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        backbone_lr_multiplier=solver.BACKBONE_LR_MULTIPLIER,
        lr_layer_decay=solver.LR_LAYER_DECAY,
    )
    foreign = solver.get("OPTIMIZER", solver.OPTIMIZER_NAME)  # of Mask2Former, Detic, Panoptic-DeepLab
    if foreign.lower() != solver.OPTIMIZER_NAME.lower():
        logger.warning("SOLVER.OPTIMIZER=%s is ignored; using SOLVER.OPTIMIZER_NAME=%s", foreign, solver.OPTIMIZER_NAME)
    optimizer: torch.optim.Optimizer
    if solver.OPTIMIZER_NAME == "SGD":
        optimizer = torch.optim.SGD(
            groups,
            solver.BASE_LR,
            solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
            foreach=True,
        )
    else:
        optimizer = torch.optim.AdamW(groups, solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    logger.info("Parameter groups of %s:\n%s", solver.OPTIMIZER_NAME, _table(cfg, model, optimizer))
    if solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_TYPE == "full_model":
        return _clip_full_model(optimizer, solver.CLIP_GRADIENTS.CLIP_VALUE, solver.CLIP_GRADIENTS.NORM_TYPE)
    return maybe_add_gradient_clipping(cfg, optimizer)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Build Detectron2's schedule SOLVER.LR_SCHEDULER_NAME.

    The step after the last iteration is an IndexError of fvcore's WarmupStepWithFixedGammaLR. Here it has the learning
    rate of the last iteration.
    """
    scheduler = detectron2.solver.build_lr_scheduler(cfg, optimizer)
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        schedule = scheduler._multiplier
        scheduler._multiplier = lambda progress: schedule(min(progress, _END))
    return scheduler


def _clip_full_model(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float) -> torch.optim.Optimizer:
    """Scale all gradients together before each step, as DETR and Mask2Former do; Detectron2 clips each parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def get_optimizer_params(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = 0.0,
    weight_decay_bias: float | None = 0.0,
    weight_decay_rel_pos: float = 0.0,
    bias_lr_factor: float = 1.0,
    backbone_lr_multiplier: float = 1.0,
    lr_layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the parameter groups of the trainable parameters of ``model``.

    Learning rates and weight decays are those of Detectron2's ``get_default_optimizer_params``, except: learning rates
    of the bottom-up network are multiplied by :func:`lr_factors`, relative position tables have the weight decay
    ``weight_decay_rel_pos``, and other parameters in a mixer's :meth:`Mixer.no_weight_decay` have none.

    Raises:
        ValueError: see :func:`lr_factors`.
    """
    factors = lr_factors(model, backbone_lr_multiplier, lr_layer_decay)

    def lr_factor(name: str) -> float:
        # Not Detectron2's bias_lr_factor, which would replace the factor of the layer.
        bias = bias_lr_factor if name.rpartition(".")[2] == "bias" else 1.0
        return bias * factors.get(name, 1.0)

    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        weight_decay_bias=weight_decay_bias,
        lr_factor_func=lr_factor,
    )
    # Not Detectron2's overrides, which match the last part of a name only. Here the last group of a parameter wins.
    return reduce_param_groups([*groups, *_mixer_weight_decay(model, weight_decay_rel_pos)])


def lr_factors(model: nn.Module, multiplier: float, decay: float) -> dict[str, float]:
    """Return the learning rate multiplier of each parameter of the bottom-up network by name; empty if all are 1.

    The multiplier is ``multiplier * decay ** d``, where the keys of a config are SOLVER.BACKBONE_LR_MULTIPLIER and
    SOLVER.LR_LAYER_DECAY. The distance d is 1 for the last block, one more for each block before it, and one more than
    that of the first block for the stem. Parameters after the last block (timm's final_conv) have its multiplier.

    Raises:
        ValueError: a multiplier other than 1 is set and ``model`` has no backbone, or its layers have unknown names.

    Source: timm's param_groups_layer_decay; Li et al., Exploring Plain Vision Transformer Backbones for Object
    Detection, ECCV 2022 (arXiv 2203.16527).
    """
    if multiplier == decay == 1:
        return {}
    layers = _backbone_layers(model)
    if not layers:
        raise ValueError(
            f"SOLVER.BACKBONE_LR_MULTIPLIER={multiplier} SOLVER.LR_LAYER_DECAY={decay} are invalid: expected a model "
            "with parameters under 'backbone.'. Fix: set both to 1.0"
        )
    if decay == 1:
        return dict.fromkeys(layers, multiplier)
    order = [layer for layer in dict.fromkeys(layers.values()) if layer]
    if "" in layers.values() or len(order) < 2:
        prefix = _backbone_prefix(layers)
        parts = dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in layers)
        raise ValueError(
            f"SOLVER.LR_LAYER_DECAY={decay} is invalid: expected a backbone with layers named stem, res2.0, ... or "
            f"stem, stages.0.0, ..., got {', '.join(parts)}. Fix: set it to 1.0"
        )
    return {name: multiplier * decay ** (len(order) - order.index(layer)) for name, layer in layers.items()}


def _mixer_weight_decay(model: nn.Module, rel_pos: float) -> list[dict[str, Any]]:
    """Return parameter groups with the weight decay of parameters that mixers declare."""
    tables: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for mixer in model.modules():
        if isinstance(mixer, Mixer):
            for name in sorted(mixer.no_weight_decay() | set(mixer.rel_pos_tables)):
                parameter = mixer.get_parameter(name)
                if parameter.requires_grad:
                    (tables if name in mixer.rel_pos_tables else others).append(parameter)
    return [
        {"params": tables, "weight_decay": rel_pos},
        {"params": others, "weight_decay": 0.0},
    ]


def _backbone_layers(model: nn.Module) -> dict[str, str]:
    """Return the layer of each backbone parameter: empty before the first layer, the last one after it."""
    names = [name for name, _ in model.named_parameters()]
    prefix = _backbone_prefix(names)
    layers, layer = {}, ""
    for name in names:
        if prefix and name.startswith(prefix):
            match = _LAYER.match(name, len(prefix))
            layer = match[1] if match else layer
            layers[name] = layer
    return layers


def _backbone_prefix(names: Iterable[str]) -> str:
    names = list(names)
    return next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")


def _table(cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a table with one row for each parameter group."""
    layers = _backbone_layers(model)
    by_layer = cfg.SOLVER.LR_LAYER_DECAY != 1
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = []
    for group in optimizer.param_groups:
        counts: Counter[str] = Counter()
        for parameter in group["params"]:
            name = names[parameter]
            counts[(layers[name] if by_layer else "backbone") if name in layers else "other"] += parameter.numel()
        rows.append(
            [
                f"{group['lr']:.4g}",
                f"{group['weight_decay']:.4g}",
                len(group["params"]),
                f"{counts.total():,}",
                ", ".join(counts),
            ]
        )
    headers = ["lr", "weight decay", "tensors", "parameters", "layers"]
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True)
