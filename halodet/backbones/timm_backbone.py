"""timm's networks with halo, bottleneck and lambda attention as Detectron2 backbones, for images of any size."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from halodet.mixers.botnet import BoTNetMixer
from halodet.mixers.halo import HaloMixer
from halodet.models.act_checkpoint import check_stages, run_stage

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

logger = logging.getLogger(__name__)

STAGES = ("res2", "res3", "res4", "res5")
NORMS = ("BN", "FrozenBN", "SyncBN")
_UNSET_STD = ([1.0, 1.0, 1.0], [57.375, 57.12, 58.395])  # Detectron2's default, and that of halodet's own configs


class TimmBackbone(Backbone):
    """A network of timm's family with attention (``byoanet``) as a backbone: images (B, in_channels, H, W) of any size -> maps.

    The network is timm's own. Only what cannot take any size is replaced, with the same weights: timm's halo attention by
    :class:`HaloMixer` with zeros outside the map, its bottleneck attention by :class:`BoTNetMixer`. Parameters keep timm's names
    (``stem.…``, ``stages.…``, ``final_conv.…``). At sizes timm accepts the maps are those of its ``features_only`` model: ``res5`` is taken
    after ``final_conv`` where a network has one.

    Lambda layers and squeeze-excitation look at the whole map, zeros that pad a batch included, as they do in timm.

    Args:
        name: timm's name of the network, with or without the tag of its weights (``"halonet50ts.a1h_in1k"``).
        in_channels: of the images.
        norm: ``"BN"``, ``"FrozenBN"`` or ``"SyncBN"``.
        out_features: names of the maps to return, ``res2`` … ``res5`` at strides 4 … 32; stages beyond the last one named are not built.
        drop_path_rate: probability of dropping the last block's branch while training, rising linearly from 0 at the first block.
        freeze_at: stages kept from training: 0 none, 1 the stem, 2 the stem and res2, ... 5 all.
        window: of bottleneck attention, pixels of its map (stride 32) along a side; 0 for the whole map.
        position: how bottleneck attention reads its tables at other sizes, ``"interpolate"`` or ``"offset"``.
        backend: what computes attention, see :func:`halodet.attention.halo_attention`.
        use_act_checkpoint: stages whose activations are computed again in the backward pass instead of being kept.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown name or value.
    """

    @configurable
    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 3,
        norm: str = "FrozenBN",
        out_features: Sequence[str] = STAGES,
        drop_path_rate: float = 0.0,
        freeze_at: int = 0,
        window: int = 0,
        position: str = "interpolate",
        backend: str = "auto",
        use_act_checkpoint: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(
                f"norm is {norm!r}, expected one of {list(NORMS)}: the weights of {name} are those of batch norm"
            )
        if not out_features or not set(out_features) <= set(STAGES):
            raise ValueError(
                f"out_features are {list(out_features)}, expected at least one of {list(STAGES)} and nothing else"
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}, expected 0 or more and less than 1")
        check_stages(use_act_checkpoint, STAGES, "use_act_checkpoint")
        import timm
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        pretrained_cfg(name)
        net = timm.create_model(name, in_chans=in_channels, num_classes=0, drop_path_rate=drop_path_rate)
        _replace_attention(net, window=window, position=position, backend=backend)
        if norm != "BN":
            net = (freeze_batch_norm_2d if norm == "FrozenBN" else convert_sync_batchnorm)(net)

        self.use_act_checkpoint = tuple(use_act_checkpoint)
        self._out_features = list(out_features)
        stages = max(STAGES.index(f) for f in out_features) + 1
        # timm's last feature is that of final_conv, which is there, perhaps as an identity, in all of them
        features = [f for f in net.feature_info if f["module"].startswith(("stages.", "final_conv"))][:stages]
        self._out_feature_strides = {f: info["reduction"] for f, info in zip(STAGES, features, strict=False)}
        self._out_feature_channels = {f: info["num_chs"] for f, info in zip(STAGES, features, strict=False)}
        self.stem = net.stem
        self.stages = net.stages[:stages]
        self.final_conv = net.final_conv if stages == len(STAGES) else nn.Identity()
        frozen = ([self.stem] if freeze_at >= 1 else []) + list(self.stages[: max(0, freeze_at - 1)])
        for part in frozen + ([self.final_conv] if freeze_at > len(STAGES) else []):
            part.requires_grad_(False)
            freeze_batch_norm_2d(part)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.TIMM
        check_input(cfg)
        return {
            "name": node.NAME,
            "in_channels": input_shape.channels,
            "norm": node.NORM,
            "out_features": node.OUT_FEATURES,
            "drop_path_rate": node.DROP_PATH_RATE,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "window": node.WINDOW_SIZE,
            "position": node.REL_POS_MODE,
            "backend": node.BACKEND,
            "use_act_checkpoint": node.USE_ACT_CHECKPOINT,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, in_channels, H, W) -> the maps named in ``out_features``, each (B, channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if x.dim() != 4:
            raise ValueError(f"TimmBackbone takes images (B, C, H, W), got a tensor of shape {tuple(x.shape)}")
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # faster there, see HaloNet.forward
        x = self.stem(x)
        maps = {}
        for name, stage in zip(STAGES, self.stages, strict=False):
            x = maps[name] = run_stage(stage, x, recompute=name in self.use_act_checkpoint)
        if "res5" in maps:
            maps["res5"] = self.final_conv(x)
        return {name: maps[name] for name in self._out_features}


def pretrained_cfg(name: str) -> Any:
    """What timm knows of the weights called ``name``: input size, mean and std of a pixel in 0 … 1, where they are.

    Raises:
        ImportError: timm is not installed.
        ValueError: there is no such network, or timm has no weights of that tag for it.
    """
    try:
        from timm.models import get_pretrained_cfg, list_models
    except ImportError as error:
        raise ImportError(
            f"{name} is a network of timm, which is not installed: pip install 'halodet[timm]'"
        ) from error
    network, _, tag = name.partition(".")
    networks = list_models(module="byoanet")
    tagged = list_models(module="byoanet", pretrained=True, include_tags=True)
    if network not in networks or (tag and name not in tagged):
        known = [n for n in tagged if n.startswith(f"{network}.")] or [*tagged, *networks]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(f"timm has no {name!r} among its networks with attention: the nearest are {', '.join(near)}")
    return get_pretrained_cfg(name)


def expected_input(name: str) -> tuple[str, list[float], list[float]]:
    """INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD (of pixels in 0 … 255) that timm's weights ``name`` were trained with."""
    known = pretrained_cfg(name)
    return "RGB", [round(255 * m, 3) for m in known.mean], [round(255 * s, 3) for s in known.std]


def check_input(cfg: CfgNode) -> None:
    """Compare the config's channel order and normalisation with those of its timm weights, unless MODEL.TIMM.CHECK_PREPROCESSING is off.

    Raises:
        ValueError: they differ; the message has the right values.
    """
    given = [cfg.INPUT.FORMAT, *cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD]
    order, mean, std = expected_input(cfg.MODEL.TIMM.NAME)
    same = (
        len(given) == 7
        and given[0] == order
        and all(abs(a - b) < 0.01 for a, b in zip(given[1:], mean + std, strict=True))
    )
    if cfg.MODEL.TIMM.CHECK_PREPROCESSING and not same:
        raise ValueError(
            f"{cfg.MODEL.TIMM.NAME} was trained with INPUT.FORMAT {order} MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std}, but the config "
            f"has {given[0]}, {list(cfg.MODEL.PIXEL_MEAN)} and {list(cfg.MODEL.PIXEL_STD)}: set these three, or MODEL.TIMM.CHECK_PREPROCESSING "
            "False to keep yours"
        )


def apply_pretrained_preprocessing(cfg: CfgNode) -> None:
    """Set the channel order and normalisation of timm's weights in a config that has left them at a default; others are not touched."""
    unset = cfg.INPUT.FORMAT == "BGR" and list(cfg.MODEL.PIXEL_STD) in _UNSET_STD
    if cfg.MODEL.TIMM.CHECK_PREPROCESSING and unset:
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = expected_input(cfg.MODEL.TIMM.NAME)
        logger.info(
            f"As {cfg.MODEL.TIMM.NAME} was trained: INPUT.FORMAT {cfg.INPUT.FORMAT}, MODEL.PIXEL_MEAN {cfg.MODEL.PIXEL_MEAN}, "
            f"MODEL.PIXEL_STD {cfg.MODEL.PIXEL_STD}"
        )


def _replace_attention(net: nn.Module, *, window: int, position: str, backend: str) -> None:
    from timm.layers.bottleneck_attn import BottleneckAttn
    from timm.layers.halo_attn import HaloAttn

    for path, theirs in list(net.named_modules()):
        if not isinstance(theirs, HaloAttn | BottleneckAttn):
            continue
        projection = theirs.kv if isinstance(theirs, HaloAttn) else theirs.qkv
        if projection.bias is not None or theirs.scale_pos_embed:
            raise ValueError(
                f"{path} of timm's network has a bias or scaled positions, which halodet's attention has not"
            )
        pooled = isinstance(theirs.pool, nn.AvgPool2d)
        shape = {
            "channels": projection.in_channels,
            "value_channels": theirs.dim_out_v,
            "num_heads": theirs.num_heads,
            "qk_channels": theirs.dim_out_qk,
            "backend": backend,
        }
        if isinstance(theirs, HaloAttn):
            stride = 2 if pooled else theirs.block_stride
            ours = HaloMixer(
                stride=stride, block_size=theirs.block_size, halo_size=theirs.halo_size, border="zero", **shape
            )
            if ours.pool != pooled:
                raise ValueError(
                    f"{path} of timm's network averages a block of {theirs.block_size} pixels, which halodet's does not"
                )
        else:
            size = (theirs.pos_embed.height, theirs.pos_embed.width)
            ours = BoTNetMixer(table_size=size, stride=2 if pooled else 1, window=window, position=position, **shape)
        ours.load_state_dict(theirs.state_dict(), assign=True)
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, ours)
