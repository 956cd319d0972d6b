"""Names of the same weights in different programs: mapping for loading, and conversion between the forms of a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from halodet.checkpoint.model_spec import BACKBONE, ModelSpec
from halodet.errors import CheckpointError

from torch import Tensor

Rename = Callable[[str], str]

# torchvision's and timm's ResNets -> Detectron2's.
TORCHVISION = [
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"(^|\.)bn(\d)\.", r"\1conv\2.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^conv1\.", "stem.conv1."),
]
# Detectron2's ResNets -> HaloNet, which has a mixer in place of their 3x3 convolution.
DETECTRON2 = [
    (r"^(stem\.conv1|res\d\.\d+\.(?:conv1|conv3|shortcut))\.weight$", r"\1.conv.weight"),
    (r"^(res\d\.\d+\.)conv2\.weight$", r"\1mixer.conv.weight"),
    (r"^(res\d\.\d+\.)conv2\.norm\.", r"\1norm2."),
]
# Last layers of classifiers: HaloNet's and timm's, torchvision's, its conversion to Detectron2's names, MSRA's.
CLASSIFIER = re.compile(r"^(stem\.fc|head|fc|fc1000|linear|classifier)\.")
FINAL_CONV = "final_conv."  # timm's, which a detector may lack

FORMS = ("timm", "classifier", "backbone", "detector")
PREFIXES = ("backbone.bottom_up.", "backbone.")  # of a backbone in a detector, with and without FPN
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
_HEADS = ("head.", "fc.", "classifier.")
_NETWORK = re.compile(r"(stem|res\d|stages)\.")


def key_mappings(spec: ModelSpec, names: Iterable[str]) -> dict[str, Rename]:
    """Return candidate mappings from the names of a file to those of a model, by description, simplest first."""
    bare = not any(BACKBONE.match(name) for name in names)

    def into_backbone(*rules: list) -> Rename:
        def rename(name: str) -> str:
            inside = BACKBONE.match(name)
            if not inside and not bare:
                return name
            name = name[inside.end() :] if inside else name
            for group in rules:
                name = substitute(name, group)
            return spec.backbone + name

        return rename

    found: dict[str, Rename] = {"none": lambda name: name, "backbone": into_backbone()}
    if spec.kind == "halonet":
        found["Detectron2 ResNet"] = into_backbone(DETECTRON2)
        found["torchvision ResNet"] = into_backbone(TORCHVISION, DETECTRON2)
    elif spec.kind == "resnet":
        found["torchvision ResNet"] = into_backbone(TORCHVISION)
    return found


def by_suffix(spec: ModelSpec, names: Iterable[str]) -> Rename:
    """Return Detectron2's matching heuristics: each tensor of the model takes the file's longest name that ends its own
    name."""
    known, taken = set(names), {}
    for name in spec.shapes:
        parts = name.split(".")
        suffixes = (".".join(parts[i:]) for i in range(len(parts)))
        suffix = next((suffix for suffix in suffixes if suffix in known), None)
        if suffix is not None:
            taken[suffix] = None if suffix in taken else name  # ambiguous names match nothing
    return lambda name: taken.get(name) or name


def substitute(name: str, rules: list[tuple[str, str | Callable]]) -> str:
    """Apply all rules (pattern, replacement) in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def shared_prefixes(names: Iterable[str]) -> list[str]:
    """Return the dotted prefixes that all names share, which a wrapper may have added, from the empty one to the
    longest."""
    names = list(names)
    found = [""]
    for part in names[0].split(".")[:-1] if names else []:
        prefix = f"{found[-1]}{part}."
        if not all(name.startswith(prefix) for name in names):
            break
        found.append(prefix)
    return found


@dataclass
class Conversion:
    """Result of :func:`convert`.

    Attributes:
        source: form of the input, ``"detector"``, ``"classifier"`` or ``"backbone"``.
        tensors: the converted weights.
        left_out: tensors of the input without a place in the new form, under their old names.
        filled: number of tensors of ``into`` that were replaced.
        unfilled: names of tensors of the backbone of ``into`` that were not replaced.
    """

    source: str
    tensors: dict[str, Tensor]
    left_out: dict[str, Tensor] = field(default_factory=dict)
    filled: int = 0
    unfilled: list[str] = field(default_factory=list)


def convert(tensors: Mapping[str, Tensor], form: str, *, into: Mapping[str, Tensor] | None = None) -> Conversion:
    """Rename weights to another form; the tensors themselves are unchanged.

    Args:
        tensors: weights of a detector, a classifier (timm's or HaloNet's) or a backbone.
        form: ``"timm"`` or ``"classifier"``, whose names are the same: no prefix, with the classification head if there
            is one; ``"backbone"``: no prefix, no head; ``"detector"``: names with a prefix, no head.
        into: weights of a detector whose backbone is replaced.

    Raises:
        CheckpointError: the weights are of no known form, or their shapes differ from those of ``into``.
    """
    if form not in FORMS:
        raise CheckpointError(f"form={form!r} is invalid: expected one of {', '.join(FORMS)}.")
    if into is not None and form != "detector":
        raise CheckpointError(f"form={form!r} is invalid with into: expected detector.")
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    own = backbone_prefix(tensors)
    if not any(_NETWORK.match(name[len(own) :]) for name in tensors if name.startswith(own)):
        first = next(iter(tensors), "none")
        raise CheckpointError(f"the weights start with {first}: expected names such as stem.*, res2.* or stages.*.")
    others = {n: t for n, t in tensors.items() if (not n.startswith(own) if own else n.startswith(_HEADS))}
    network = {name[len(own) :]: tensor for name, tensor in tensors.items() if name not in others}
    heads = {name: tensor for name, tensor in others.items() if not own and name.startswith(_HEADS)}
    source = "detector" if own else "classifier" if heads else "backbone"
    if into is not None:
        return _fill(source, network, others, into)
    target = (own or PREFIXES[0]) if form == "detector" else ""
    kept = {} if form == "backbone" else heads if form != "detector" else others if own else {}
    left_out = {name: tensor for name, tensor in others.items() if name not in kept}
    names = {name: name if name in kept else target + name[len(own) :] for name in tensors if name not in left_out}
    return Conversion(source, {new: tensors[old] for old, new in names.items()}, left_out)


def backbone_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix of the backbone in a detector, one of :data:`PREFIXES`; empty for other weights."""
    return next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)), "")


def _fill(source: str, network: dict[str, Tensor], others: dict[str, Tensor], into: Mapping[str, Tensor]) -> Conversion:
    prefix = backbone_prefix(into)
    if not prefix:
        raise CheckpointError(f"into is not a detector: expected names that start with {' or '.join(PREFIXES)}.")
    for name, tensor in network.items():
        current = into.get(prefix + name)
        if current is not None and current.shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(current.shape)}, as in the detector."
            )
    filled = {prefix + name: tensor for name, tensor in network.items() if prefix + name in into}
    backbone = [name for name in into if name.startswith(prefix) and _NETWORK.match(name[len(prefix) :])]
    if not filled:
        first = backbone[0] if backbone else prefix + "*"
        raise CheckpointError(f"no tensor has a place in the detector, whose backbone starts with {first}.")
    left_out = {name: tensor for name, tensor in network.items() if prefix + name not in into} | others
    tensors = {name: filled.get(name, tensor) for name, tensor in into.items()}
    return Conversion(source, tensors, left_out, len(filled), [name for name in backbone if name not in filled])
