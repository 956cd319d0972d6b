"""Registration of every row of VARIANTS with timm, so that timm's training script can pretrain it on ImageNet.

Importing this module registers ``halodet_halonet_h0`` to ``halodet_halonet_h7``, ``halodet_r50_se``,
``halodet_r50_se_halo_b8h3`` and so on. They are the networks of the detectors (convolutions in stages 1 and 2,
``border="mask"``), so that the weights fit a detector; ``mixers=["halo", "halo", "halo", "halo"]`` gives the
all-attention form. There are no pretrained weights.
"""

import dataclasses
import functools
from typing import Any

from halodet.mixers import Mixer
from halodet.models.halonet import STAGES, HaloNet, prepare_images
from halodet.models.variants import VARIANTS, HaloNetVariant, get_variant

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

_FIELDS = tuple(field.name for field in dataclasses.fields(HaloNetVariant))
POOLS = ("avg", "max", "avgmax", "")
# training image sizes of keras_cv_attention_models; 256 for the others
_IMAGE_SIZES = {"H3": 320, "H4": 384, "H5": 448, "H6": 512, "H7": 600}


class HaloNetClassifier(HaloNet):
    """The classifier form of :class:`HaloNet` with timm's interface.

    It maps images (B, in_chans, H, W) of any size to logits (B, num_classes). Its parameters have the names
    of ``HaloNet(num_classes=...)``.

    Args:
        variant: name of a row of VARIANTS.
        num_classes: number of classes; 0 returns the pooled features (B, head_hidden_size) instead of logits.
        in_chans: number of image channels.
        global_pool: one of :data:`POOLS`; ``""`` for no pooling, so that the last layer must be removed too.
        drop_rate: dropout probability before the last layer.
        drop_path_rate: drop path probability of the last block, rising linearly from 0 at the first.
        norm: as in :class:`HaloNet`.
        backend: as in :class:`HaloNet`.
        output_stride: as in :class:`HaloNet`.
        bn_momentum: momentum of the batch norms; None for PyTorch's default.
        bn_eps: epsilon of the batch norms; None for PyTorch's default.
        **overrides: fields of :class:`HaloNetVariant` that replace those of the row, for example ``block_size=10``.

    Raises:
        ValueError: an argument is unknown or invalid.
    """

    def __init__(
        self,
        variant: str,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm: str = "BN",
        backend: str = "auto",
        output_stride: int = 32,
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        **overrides: Any,
    ) -> None:
        unknown = sorted(set(overrides) - set(_FIELDS))
        if unknown:
            value = overrides[unknown[0]]
            raise ValueError(
                f"{unknown[0]}={value!r} is invalid: expected an argument of timm or one of {', '.join(_FIELDS)}"
            )
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate={drop_rate} is invalid: expected at least 0 and less than 1")
        super().__init__(
            get_variant(variant, **overrides),
            in_channels=in_chans,
            norm=norm,
            out_features=["res5"],
            drop_path_rate=drop_path_rate,
            num_classes=max(1, num_classes),
            backend=backend,
            output_stride=output_stride,
        )
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.feature_channels["res5"]  # of forward_features
        self.head_hidden_size: int = (
            self.variant.final_channels or self.num_features
        )  # of forward_head(pre_logits=True)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = module.momentum if bn_momentum is None else bn_momentum
                module.eps = module.eps if bn_eps is None else bn_eps
        self.feature_info = [
            {"num_chs": self.feature_channels[name], "reduction": self.feature_strides[name], "module": name}
            for name in STAGES
        ]
        self._set_pool(global_pool)
        if num_classes < 1:
            self.reset_classifier(0)
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to features (B, num_features, ceil(H / 32), ceil(W / 32))."""
        return self._run_stages(x)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features of the last stage and the feature maps of chosen stages.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages, 0 to 3 or negative from the end; an integer n stands for the last n, None for all.
            norm: without effect; the feature maps are normalized.
            stop_early: do not run the stages after the last one chosen.
            output_fmt: only ``"NCHW"``.
            intermediates_only: return the list of feature maps only.

        Raises:
            ValueError: ``output_fmt`` is another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is invalid: expected 'NCHW'")
        chosen, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.stem(prepare_images(x))
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in chosen:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one of ``indices``, and the head; return the stages chosen."""
        chosen, last = feature_take_indices(len(self.stages), indices)
        for name in STAGES[last + 1 : len(self.stages)]:
            delattr(self, name)
        if prune_head:
            self.head.final = nn.Identity()
            self.reset_classifier(0, "")
        return chosen

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features (B, num_features, h, w) to (B, num_classes), or to (B, head_hidden_size) with ``pre_logits``."""
        x = self._pool(self.head.final(x))
        if pre_logits:
            return x
        return self.head.linear(F.dropout(x, self.drop_rate, self.training))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one for ``num_classes`` classes, or remove it for 0; set the pooling."""
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        old = next(self.parameters())
        self.head.linear = nn.Identity()
        if num_classes > 0:
            linear = nn.Linear(self.head_hidden_size, num_classes, device=old.device, dtype=old.dtype)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            self.head.linear = linear

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, as the mixers declare them."""
        mixers = [(name, module) for name, module in self.named_modules() if isinstance(module, Mixer)]
        return {f"{name}.{parameter}" for name, mixer in mixers for parameter in mixer.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the layers of timm's layer decay: the stem, each block (``coarse``: each stage) and the head."""
        block = r"^res(\d+)" if coarse else r"^res(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(block, None), (r"^head\.final", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass and recompute the rest."""
        for stage in self.stages:
            stage.use_act_checkpoint = enable

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "avg":
            return x.mean((-2, -1))
        if self.global_pool == "max":
            return x.amax((-2, -1))
        return (x.mean((-2, -1)) + x.amax((-2, -1))) / 2 if self.global_pool == "avgmax" else x

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool={global_pool!r} is invalid: expected one of {', '.join(map(repr, POOLS))}")
        self.global_pool = global_pool


def _model_name(variant: str) -> str:
    name = variant.lower().replace("-", "_")
    return f"halodet_halonet_{name}" if "_" not in name else f"halodet_{name}"


def _cfg(variant: str) -> dict[str, Any]:
    size = _IMAGE_SIZES.get(variant, 256)
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // 32),) * 2,
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv1.conv",
        "classifier": "head.linear",
        "license": "apache-2.0",
    }


TIMM_MODELS = {_model_name(variant): variant for variant in VARIANTS}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(variant) for name, variant in TIMM_MODELS.items()})


def _register(name: str, variant: str) -> None:
    def model(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        build = functools.partial(HaloNetClassifier, variant)
        return build_model_with_cfg(build, name, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3)}, **kwargs)

    model.__name__ = model.__qualname__ = name
    model.__doc__ = f"Build {variant} of VARIANTS as a classifier."
    globals()[name] = register_model(model)


for _name, _variant in TIMM_MODELS.items():
    _register(_name, _variant)
