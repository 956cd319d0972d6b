"""The optimizer of a run: Detectron2's SGD or AdamW, with a reduced rate for the backbone and its layers."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups
from tabulate import tabulate
from torch import nn

logger = logging.getLogger(__name__)

OPTIMIZERS = ("SGD", "AdamW")
REL_POS = ("height_rel", "width_rel")
# Where the bottom-up network's parameters are, with an FPN and without one.
_PREFIXES = ("backbone.bottom_up.", "backbone.")
_LAYER = re.compile(r"(stem|res\d+\.\d+|stages\.\d+\.\d+)\.")
_REST = "the rest"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer SOLVER.OPTIMIZER names, for the trainable parameters of ``model``; its groups are logged as a table.

    Rates and decays are those Detectron2 gives (BASE_LR, BIAS_LR_FACTOR, WEIGHT_DECAY, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS), except:
    rates of the bottom-up network are multiplied as :func:`rate_factors` says, and tables of relative positions get
    SOLVER.WEIGHT_DECAY_REL_POS.

    Raises:
        ValueError: the keys ask for rates of a backbone, or of its layers, that ``model`` does not have.
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        optimizer = build_sgd(cfg, model)
    else:
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = torch.optim.AdamW(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)

    factors, layers = rate_factors(cfg, model), _layers(model)
    # Sorted, because groups are joined only where their options stand in the same order.
    options = {
        p: {k: v for k, v in sorted(group.items()) if k != "params"}
        for group in optimizer.param_groups
        for p in group["params"]
    }
    groups, members = [], defaultdict(list)
    # In the model's order, in which Detectron2's groups are too: a checkpoint's state of the optimizer goes by position.
    for name, parameter in model.named_parameters():
        if parameter not in options:  # frozen
            continue
        own = options[parameter]
        own["lr"] *= factors.get(name, 1.0)
        if name.rpartition(".")[2] in REL_POS:
            own["weight_decay"] = cfg.SOLVER.WEIGHT_DECAY_REL_POS
        groups.append({"params": [parameter], **own})
        layer = (layers[name] if cfg.SOLVER.LR_LAYER_DECAY != 1 else "backbone") if name in layers else _REST
        members[own["lr"], own["weight_decay"]].append((layer, parameter.numel()))
    optimizer.param_groups.clear()
    for group in reduce_param_groups(groups):
        optimizer.add_param_group(group)
    logger.info(f"{cfg.SOLVER.OPTIMIZER}'s parameter groups:\n{_table(members)}")
    return optimizer


def rate_factors(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """What the rate of each parameter of the bottom-up network is multiplied by: name -> factor.

    It is SOLVER.BACKBONE_MULTIPLIER · SOLVER.LR_LAYER_DECAY^d, where d is the distance of a parameter's layer from the end: 1 for the last
    block, one more for each block before it, and one more than the first block's for the stem. What comes after the last block (timm's
    final_conv) has the last block's. Layers are known by their names: HaloNet's and Detectron2's ResNets' (stem, res2.0, ...) and those
    of timm's networks of blocks (stem, stages.0.0, ...).

    Raises:
        ValueError: a factor other than 1 is asked for, and ``model`` has no backbone; or a layer decay, and its layers are not so named.

    Source: timm's param_groups_layer_decay; Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022
    (arXiv 2203.16527).
    """
    factor, decay = cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.SOLVER.LR_LAYER_DECAY
    if factor == decay == 1:
        return {}
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "SOLVER.BACKBONE_MULTIPLIER and LR_LAYER_DECAY need a model whose parameters are under 'backbone.': set them to 1.0"
        )
    if decay == 1:
        return dict.fromkeys(layers, factor)
    order = [layer for layer in dict.fromkeys(layers.values()) if layer]
    if "" in layers.values() or len(order) < 2:
        parts = dict.fromkeys(name.removeprefix(_prefix(layers)).partition(".")[0] for name in layers)
        raise ValueError(
            "SOLVER.LR_LAYER_DECAY needs a backbone of layers named stem, res2.0, res2.1, ... or stem, stages.0.0, stages.0.1, ..., "
            f"and this one has {', '.join(parts)}: set it to 1.0"
        )
    return {name: factor * decay ** (len(order) - order.index(layer)) for name, layer in layers.items()}


def _layers(model: nn.Module) -> dict[str, str]:
    """Parameters of the bottom-up network, frozen ones too -> their layer: "" before the first one, the last one after it."""
    names = [name for name, _ in model.named_parameters()]
    prefix = _prefix(names)
    layers, layer = {}, ""
    for name in names:
        if prefix and name.startswith(prefix):
            match = _LAYER.match(name, len(prefix))
            layer = match[1] if match else layer
            layers[name] = layer
    return layers


def _prefix(names: Iterable[str]) -> str:
    """What the names of the bottom-up network's parameters begin with; empty where there is none."""
    names = list(names)
    return next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")


def _table(members: dict[tuple[float, float], list[tuple[str, int]]]) -> str:
    """(rate, decay) -> (layer, parameters) of each tensor, as one row for each rate and decay."""
    rows = []
    for (rate, decay), tensors in members.items():
        layers = Counter()
        for layer, count in tensors:
            layers[layer] += count
        rows.append([f"{rate:.4g}", f"{decay:.4g}", len(tensors), f"{sum(layers.values()):,}", ", ".join(layers)])
    return tabulate(
        rows, ["rate", "weight decay", "tensors", "parameters", "of"], tablefmt="simple", disable_numparse=True
    )
