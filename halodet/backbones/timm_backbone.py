"""timm's networks with halo, bottleneck and lambda attention as Detectron2 backbones."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from halodet.mixers import BoTNetMixer, HaloMixer, Mixer
from halodet.models.act_checkpoint import check_stages, run_blocks
from halodet.utils.exporting import channels_last

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

logger = logging.getLogger(__name__)

STAGES = ("res2", "res3", "res4", "res5")
NORMS = ("BN", "FrozenBN", "SyncBN")
# PIXEL_STD of Detectron2's defaults and of halodet's own configs
_DEFAULT_STD = ([1.0, 1.0, 1.0], [57.375, 57.12, 58.395])


class TimmBackbone(Backbone):
    """A timm network with attention (module ``byoanet``) as a backbone for images of any size.

    The network is timm's own. Only layers that require a fixed size are replaced, with the same weights: timm's halo
    attention by :class:`HaloMixer` with ``border="zero"``, its bottleneck attention by :class:`BoTNetMixer`. Parameters
    keep timm's names (``stem.*``, ``stages.*``, ``final_conv.*``). At sizes that timm accepts, the feature maps are
    those of its ``features_only`` model; ``res5`` is the output of ``final_conv`` where a network has one. Lambda
    layers and squeeze-excitation see the whole map including the padding of a batch, as in timm. Its batch norms hold
    the activations, which the converters of Detectron2 and PyTorch to FrozenBN and SyncBN would remove: use ``norm``.

    Args:
        name: timm's name of the network, with or without the tag of its weights (``"halonet50ts.a1h_in1k"``).
        in_channels: number of image channels.
        norm: ``"BN"``, ``"FrozenBN"`` or ``"SyncBN"``.
        out_features: names of the feature maps to return, ``res2`` to ``res5`` at strides 4 to 32; stages after the
            last one named are not built.
        drop_path_rate: drop path probability of the last block, rising linearly from 0 at the first block.
        freeze_at: number of frozen parts: 0 none, 1 the stem, 2 the stem and res2, ... 5 all.
        window: side of the windows of bottleneck attention, in pixels of its feature map; 0 for the whole map.
        position: how bottleneck attention reads its tables at other sizes, ``"interpolate"`` or ``"offset"``.
        backend: attention backend, see :func:`halodet.attention.halo_attention`.
        use_act_checkpoint: stages whose activations are recomputed in the backward pass.

    Raises:
        ImportError: timm is not installed.
        ValueError: a name or value is invalid.
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
            raise ValueError(f"norm={norm!r} is invalid: expected one of {', '.join(NORMS)}, which hold timm's weights")
        if not out_features or not set(out_features) <= set(STAGES):
            raise ValueError(f"out_features={list(out_features)} is invalid: expected one or more of {list(STAGES)}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} is invalid: expected at least 0 and less than 1")
        check_stages(use_act_checkpoint, STAGES, "use_act_checkpoint")
        pretrained_cfg(name)
        import timm
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        net: Any = timm.create_model(name, in_chans=in_channels, num_classes=0, drop_path_rate=drop_path_rate)
        _replace_attention(net, window=window, position=position, backend=backend)
        if norm != "BN":
            net = (freeze_batch_norm_2d if norm == "FrozenBN" else convert_sync_batchnorm)(net)

        self.use_act_checkpoint = tuple(use_act_checkpoint)
        self._out_features = list(out_features)
        last = max(STAGES.index(f) for f in out_features) + 1
        # timm's last feature is that of final_conv, an identity in some networks
        infos = [info for info in net.feature_info if info["module"].startswith(("stages.", "final_conv"))][:last]
        self._out_feature_strides = {f: info["reduction"] for f, info in zip(STAGES, infos, strict=False)}
        self._out_feature_channels = {f: info["num_chs"] for f, info in zip(STAGES, infos, strict=False)}
        self.stem: nn.Module = net.stem
        self.stages: nn.Sequential = net.stages[:last]
        self.final_conv: nn.Module = net.final_conv if last == len(STAGES) else nn.Identity()
        frozen = [self.stem, *self.stages][: max(0, freeze_at)]
        for part in [*frozen, self.final_conv] if freeze_at > len(STAGES) else frozen:
            part.requires_grad_(False)
            freeze_batch_norm_2d(part)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.HALODET_TIMM
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
        """Map images (B, in_channels, H, W) to the feature maps in ``out_features``."""
        if x.dim() != 4:
            raise ValueError(f"TimmBackbone expects images (B, C, H, W), got a tensor of shape {tuple(x.shape)}")
        if x.device.type == "cpu":
            x = channels_last(x)  # see HaloNet.forward
        x = self.stem(x)
        maps = {}
        for name, stage in zip(STAGES, self.stages, strict=False):
            x = maps[name] = run_blocks(stage, x) if name in self.use_act_checkpoint else stage(x)
        if "res5" in maps:
            maps["res5"] = self.final_conv(x)
        return {name: maps[name] for name in self._out_features}


def pretrained_cfg(name: str) -> Any:
    """Return timm's description of the weights ``name``: input size, mean and std of pixels in 0 to 1, location.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such network, or no weights with that tag.
    """
    try:
        from timm.models import get_pretrained_cfg, list_models
    except ImportError as error:
        raise ImportError(f"{name} needs timm, which does not import. Fix: pip install 'halodet[timm]'") from error
    network, _, tag = name.partition(".")
    networks = list_models(module="byoanet")
    tagged = list_models(module="byoanet", pretrained=True, include_tags=True)
    if network not in networks or (tag and name not in tagged):
        known = [n for n in tagged if n.startswith(f"{network}.")] or [*tagged, *networks]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(
            f"timm model {name!r} is invalid: expected a network of byoanet. Closest names: {', '.join(near)}"
        )
    return get_pretrained_cfg(name)


def expected_input(name: str) -> tuple[str, list[float], list[float]]:
    """Return INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD that timm trained the weights ``name`` with."""
    known = pretrained_cfg(name)
    return "RGB", [round(255 * m, 3) for m in known.mean], [round(255 * s, 3) for s in known.std]


def check_input(cfg: CfgNode) -> None:
    """Compare the preprocessing of ``cfg`` with that of its timm weights unless CHECK_PREPROCESSING is False.

    Raises:
        ValueError: they differ; the message has the values of the weights.
    """
    if not cfg.MODEL.HALODET_TIMM.CHECK_PREPROCESSING:
        return
    order, mean, std = expected_input(cfg.MODEL.HALODET_TIMM.NAME)
    given = [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD]
    close = len(given) == 6 and all(abs(a - b) < 0.01 for a, b in zip(given, mean + std, strict=True))
    if cfg.INPUT.FORMAT != order or not close:
        raise ValueError(
            f"INPUT.FORMAT={cfg.INPUT.FORMAT} MODEL.PIXEL_MEAN={list(cfg.MODEL.PIXEL_MEAN)} "
            f"MODEL.PIXEL_STD={list(cfg.MODEL.PIXEL_STD)} are invalid for the weights of "
            f"{cfg.MODEL.HALODET_TIMM.NAME}: expected {order}, {mean} and {std}. "
            "Fix: set these, or MODEL.HALODET_TIMM.CHECK_PREPROCESSING False to keep yours"
        )


def apply_pretrained_preprocessing(cfg: CfgNode) -> None:
    """Set the channel order and normalization of the timm weights in ``cfg`` if it has default values."""
    default = cfg.INPUT.FORMAT == "BGR" and list(cfg.MODEL.PIXEL_STD) in _DEFAULT_STD
    if cfg.MODEL.HALODET_TIMM.CHECK_PREPROCESSING and default:
        order, mean, std = expected_input(cfg.MODEL.HALODET_TIMM.NAME)
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = order, mean, std
        logger.info(
            "Using the preprocessing of %s: INPUT.FORMAT %s, MODEL.PIXEL_MEAN %s, MODEL.PIXEL_STD %s",
            cfg.MODEL.HALODET_TIMM.NAME,
            order,
            mean,
            std,
        )


def _replace_attention(net: nn.Module, *, window: int, position: str, backend: str) -> None:
    """Replace timm's halo and bottleneck attention in ``net`` by halodet's, with the same weights."""
    from timm.layers.bottleneck_attn import BottleneckAttn
    from timm.layers.halo_attn import HaloAttn

    theirs: Any
    for path, theirs in list(net.named_modules()):
        if not isinstance(theirs, HaloAttn | BottleneckAttn):
            continue
        projection = theirs.kv if isinstance(theirs, HaloAttn) else theirs.qkv
        if projection.bias is not None or theirs.scale_pos_embed:
            raise ValueError(f"{path} of timm's network has a bias or scaled positions, which halodet does not support")
        pooled = isinstance(theirs.pool, nn.AvgPool2d)
        shape: dict[str, Any] = {
            "channels": projection.in_channels,
            "value_channels": theirs.dim_out_v,
            "num_heads": theirs.num_heads,
            "qk_channels": theirs.dim_out_qk,
            "backend": backend,
        }
        ours: Mixer
        if isinstance(theirs, HaloAttn):
            stride = 2 if pooled else theirs.block_stride
            ours = halo = HaloMixer(
                stride=stride, block_size=theirs.block_size, halo_size=theirs.halo_size, border="zero", **shape
            )
            if halo.pool != pooled:
                raise ValueError(
                    f"{path} of timm's network averages blocks of {theirs.block_size} pixels, which is not supported"
                )
        else:
            size = (theirs.pos_embed.height, theirs.pos_embed.width)
            ours = BoTNetMixer(table_size=size, stride=2 if pooled else 1, window=window, position=position, **shape)
        ours.load_state_dict(theirs.state_dict(), assign=True)
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, ours)
