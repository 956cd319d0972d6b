"""Which network weights look like, from the names and shapes of their tensors alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

from halodet.checkpoint.key_mapping import CLASSIFIER, TORCHVISION, shared_prefixes, substitute
from halodet.checkpoint.model_spec import BACKBONE, NOT_WEIGHTS
from halodet.models import VARIANTS, HaloNet

import torch
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
# Less than this many of its tensors in common with a network, and a file is not said to look like it.
ENOUGH = 0.9


def identify(shapes: Shapes) -> str | None:
    """Name the network of which these tensors (names and shapes, of a file or a model) are the backbone; None where none is close."""
    names, best = _backbone(shapes), ("", 0.0)
    for label, known in _networks():
        common = sum(names.get(name) == shape for name, shape in known.items()) / max(len(names), len(known), 1)
        if common > best[1]:
            best = (label, common)
    return best[0] if best[1] >= ENOUGH else None


def _backbone(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors of the backbone alone, without prefix, classifier and batch norm statistics, ResNets by Detectron2's names."""
    prefix = max(
        shared_prefixes(shapes),
        key=lambda p: sum(bool(BACKBONE.match(name.removeprefix(p))) for name in shapes),
        default="",
    )
    names = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    inside = {name[m.end() :]: shape for name, shape in names.items() if (m := BACKBONE.match(name))} or names
    if not any(BACKBONE.match(f"backbone.{name}") for name in inside):
        longest = shared_prefixes(inside)[-1]
        inside = {name.removeprefix(longest): shape for name, shape in inside.items()}
    return {
        substitute(name, TORCHVISION): shape
        for name, shape in inside.items()
        if not CLASSIFIER.match(name) and not NOT_WEIGHTS.search(name) and ".running_" not in name
    }


@functools.cache
def _networks() -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    return [
        (label, _backbone({name: tuple(v.shape) for name, v in model.state_dict().items()}))
        for label, model in _build()
    ]


def _build() -> Iterator[tuple[str, nn.Module]]:
    """Every network known, on a device without memory."""
    builders: dict[str, Callable[[], nn.Module]] = {
        f"HaloNet {name}": functools.partial(HaloNet, name) for name in VARIANTS
    }
    builders |= {f"a ResNet-{depth}": functools.partial(_resnet, depth) for depth in (18, 34, 50, 101, 152)}
    try:
        import timm
    except ImportError:
        pass
    else:
        builders |= {
            f"timm's {name}": functools.partial(timm.create_model, name) for name in timm.list_models(module="byoanet")
        }
    with torch.device("meta"):
        for label, build in builders.items():
            yield label, build()


def _resnet(depth: int) -> ResNet:
    return ResNet(BasicStem(), ResNet.make_default_stages(depth))
