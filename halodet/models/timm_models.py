"""Every row of VARIANTS as a model of timm, so that timm's own training script pretrains it on ImageNet.

Importing this module registers them: ``halodet_halonet_h0`` … ``halodet_halonet_h7``, ``halodet_r50_se``, ``halodet_r50_se_halo_b8h3`` and
so on. They are the networks that the detectors use, with convolutions in stages 1 and 2 and ``border="mask"``, because what timm trains is
to be loaded into a detector; the all-attention form is ``mixers=["halo", "halo", "halo", "halo"]``. There are no pretrained weights yet.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from halodet.backbones.halonet import HaloNet, _tupled, get_variant
from halodet.models.variants import VARIANTS, HaloNetVariant

from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

_FIELDS = tuple(field.name for field in dataclasses.fields(HaloNetVariant))
_SIZES = {
    "H3": 320,
    "H4": 384,
    "H5": 448,
    "H6": 512,
    "H7": 600,
}  # as keras_cv_attention_models has them; 256 for the others


class HaloNetClassifier(HaloNet):
    """The classifier form of :class:`HaloNet` as timm wants it: images (B, in_chans, H, W) of any size -> logits (B, num_classes).

    Its parameters have the names of ``HaloNet(num_classes=...)``.

    Args:
        variant: name of a row of VARIANTS.
        num_classes: of the logits; 0 gives the pooled features (B, head_hidden_size) instead.
        in_chans: channels of the images.
        global_pool: only ``"avg"``.
        drop_rate: of the features before the last layer, while training.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        norm, backend: as in :class:`HaloNet`.
        bn_momentum, bn_eps: of the batch norms, where not PyTorch's.
        **overrides: fields of :class:`HaloNetVariant` in place of the row's, for example ``block_size=10``.

    Raises:
        ValueError: an argument that this network does not have, or values that do not fit together.
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
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        **overrides: Any,
    ) -> None:
        unknown = sorted(set(overrides) - set(_FIELDS))
        if unknown:
            raise ValueError(
                f"halodet's {variant} has no argument {unknown[0]!r}: beside timm's own it takes {', '.join(_FIELDS)}"
            )
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, expected 0 or more and below 1")
        shape = dataclasses.replace(get_variant(variant), **{name: _tupled(value) for name, value in overrides.items()})
        super().__init__(
            shape,
            in_channels=in_chans,
            norm=norm,
            out_features=["res5"],
            drop_path_rate=drop_path_rate,
            num_classes=max(1, num_classes),
            backend=backend,
        )
        self.in_chans, self.drop_rate, self.grad_checkpointing = in_chans, drop_rate, False
        self.num_features = self._out_feature_channels["res5"]  # of forward_features
        self.head_hidden_size = self.head.linear.in_features  # of forward_head(pre_logits=True)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = module.momentum if bn_momentum is None else bn_momentum
                module.eps = module.eps if bn_eps is None else bn_eps
        self._check_pool(global_pool)
        if num_classes < 1:
            self.reset_classifier(0)
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> (B, num_features, ⌈H/32⌉, ⌈W/32⌉)."""
        if not (self.grad_checkpointing and self.training):
            return HaloNet.forward(self, x)["res5"]
        x = self.stem(x)
        for stage in self.stages:
            x = checkpoint_seq(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> (B, num_classes), or (B, head_hidden_size) with ``pre_logits``."""
        x = self.head.final(x).mean((-2, -1))
        if pre_logits:
            return x
        return self.head.linear(F.dropout(x, self.drop_rate, self.training))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for ``num_classes`` classes; none for 0."""
        self._check_pool("avg" if global_pool is None else global_pool)
        self.num_classes = num_classes
        old = next(self.parameters())
        self.head.linear = nn.Identity()
        if num_classes > 0:
            self.head.linear = nn.Linear(self.head_hidden_size, num_classes, device=old.device, dtype=old.dtype)
            nn.init.normal_(self.head.linear.weight, std=0.01)
            nn.init.zeros_(self.head.linear.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the relative position tables, which are no weights to be kept small."""
        return {name for name, _ in self.named_parameters() if name.endswith(("height_rel", "width_rel"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """What timm's layer-wise rates count as one layer: the stem, a block (``coarse``: a stage), the head."""
        block = r"^res(\d+)" if coarse else r"^res(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(block, None), (r"^head\.final", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def _check_pool(self, global_pool: str) -> None:
        if global_pool != "avg":
            raise ValueError(f"global_pool is {global_pool!r}, but these networks have only 'avg'")


def _model_name(variant: str) -> str:
    name = variant.lower().replace("-", "_")
    return f"halodet_halonet_{name}" if "_" not in name else f"halodet_{name}"


def _cfg(variant: str) -> dict[str, Any]:
    size = _SIZES.get(variant, 256)
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
        if kwargs.get("features_only"):
            raise ValueError(
                f"{name} has no features_only form: halodet.HaloNet({variant!r}) is the backbone, for maps of any size"
            )
        return build_model_with_cfg(functools.partial(HaloNetClassifier, variant), name, pretrained, **kwargs)

    model.__name__ = model.__qualname__ = name
    model.__doc__ = f"{variant} of VARIANTS, in the form that the detectors use."
    globals()[name] = register_model(model)


for _name, _variant in TIMM_MODELS.items():
    _register(_name, _variant)
