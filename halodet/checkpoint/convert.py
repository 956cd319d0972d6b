"""Names of the same weights in timm, in the classifier form, in a bare backbone and in a detector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from halodet.errors import CheckpointError

from torch import Tensor

FORMS = ("timm", "classifier", "backbone", "detector")
PREFIXES = ("backbone.bottom_up.", "backbone.")  # of a backbone inside a detector: under FPN, and without
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
_HEADS = ("head.", "fc.", "classifier.")
_NETWORK = re.compile(r"(stem|res\d|stages)\.")

# From halodet's names to those of timm's own halonet_h1, and back.
_TO_TIMM = (
    (r"\bstem\.conv1\.norm\.", "stem.conv1.bn."),
    (r"\bres([2-5])\.", lambda stage: f"stages.{int(stage[1]) - 2}."),
    (r"(?<=\d\.)conv([13])\.conv\.", r"conv\1_1x1.conv."),
    (r"(?<=\d\.)conv([13])\.norm\.", r"conv\1_1x1.bn."),
    (r"(?<=\d\.)mixer\.", "self_attn."),
    (r"(?<=\d\.)norm2\.", "post_attn."),
    (r"(?<=\d\.)shortcut\.norm\.", "shortcut.bn."),
    (r"\bhead\.linear\.", "head.fc."),
)
_TO_HALODET = (
    (r"\bstem\.conv1\.bn\.", "stem.conv1.norm."),
    (r"\bstages\.([0-3])\.", lambda stage: f"res{int(stage[1]) + 2}."),
    (r"(?<=\d\.)conv([13])_1x1\.conv\.", r"conv\1.conv."),
    (r"(?<=\d\.)conv([13])_1x1\.bn\.", r"conv\1.norm."),
    (r"(?<=\d\.)self_attn\.", "mixer."),
    (r"(?<=\d\.)post_attn\.", "norm2."),
    (r"(?<=\d\.)shortcut\.bn\.", "shortcut.norm."),
    (r"\bhead\.fc\.", "head.linear."),
)


@dataclass
class Conversion:
    """What :func:`convert` made of a checkpoint."""

    source: str  # "detector", or "classifier" or "backbone", as which the weights came
    tensors: dict[str, Tensor]
    left_out: dict[str, Tensor] = field(default_factory=dict)  # names as they came
    filled: int = 0  # tensors of ``into`` that were replaced
    unfilled: list[str] = field(default_factory=list)  # tensors of its backbone that were not


def convert(
    tensors: Mapping[str, Tensor], form: str, *, into: Mapping[str, Tensor] | None = None, prefix: str | None = None
) -> Conversion:
    """The weights ``tensors`` under the names of ``form``; the tensors themselves stay as they are.

    Args:
        tensors: of a detector, a classifier (timm's or :class:`HaloNet`'s) or a backbone; which, is seen from their names.
        form: ``"timm"`` and ``"classifier"``, whose names are the same: no prefix, with the classification head if there is one;
            ``"backbone"``: no prefix, no head; ``"detector"``: the backbone's names with a prefix, no head.
        into: a detector's tensors, whose backbone is to be filled while the rest of it stays.
        prefix: of the backbone in a detector, by default that of ``into``, of ``tensors`` or ``backbone.bottom_up.``.

    Raises:
        CheckpointError: no network is recognised, or its shapes are not those of ``into``.
    """
    if form not in FORMS:
        raise CheckpointError(f"the form is {form!r}, expected one of {', '.join(FORMS)}.")
    if into is not None and form != "detector":
        raise CheckpointError(f"only a detector can be filled, but the form is {form!r}.")
    if prefix is not None and (form != "detector" or not re.fullmatch(r"(\w+\.)+", prefix)):
        raise CheckpointError(f"the prefix is {prefix!r}: only a detector has one, and it ends with a dot.")
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    own = backbone_prefix(tensors)
    if not any(_NETWORK.match(name[len(own) :]) for name in tensors if name.startswith(own)):
        first = next(iter(tensors), "none")
        raise CheckpointError(
            f"these are no weights of HaloNet or a network like it (stem.*, res2.* or stages.*), the first is {first}."
        )
    network = {name[len(own) :]: tensor for name, tensor in tensors.items() if _is_network(name, own)}
    others = {name: tensor for name, tensor in tensors.items() if not _is_network(name, own)}
    heads = {name: tensor for name, tensor in others.items() if not own and name.startswith(_HEADS)}
    source = "detector" if own else "classifier" if heads else "backbone"
    if into is not None:
        return _fill(source, network, others, into, prefix)
    if form == "detector":
        target = prefix or own or PREFIXES[0]
        kept = others if own else {}
        # a detector keeps its order and all it has
        names = [*tensors] if own else [*network]
        made = {
            n if n in kept else target + n[len(own) :]: tensors[n] for n in names if n in kept or _is_network(n, own)
        }
        return Conversion(source, made, {name: tensor for name, tensor in others.items() if name not in kept})
    kept = heads if form != "backbone" else {}
    made = {name[len(own) :]: tensor for name, tensor in tensors.items() if _is_network(name, own) or name in kept}
    return Conversion(source, made, {name: tensor for name, tensor in others.items() if name not in kept})


def backbone_prefix(tensors: Mapping[str, Tensor]) -> str:
    """What stands before the names of the backbone in ``tensors``: one of PREFIXES in a detector, else nothing."""
    return next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)), "")


def rename_for(names: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of H1's kind under ``"halodet"``'s names or under those of timm's own halonet_h1 (``"timm"``), with or without a prefix.

    Raises:
        CheckpointError: a tensor that the other network has no place for.
    """
    to_timm = names == "timm"
    foreign = r"mixer\.conv\.|\.se\.|head\.final\." if to_timm else r"stem\.conv[23]\.|conv2|\.attn|final_conv\."
    renamed = {}
    for name, tensor in tensors.items():
        if re.search(foreign, name):
            network = "timm's halonet_h1" if to_timm else "HaloNet"
            raise CheckpointError(
                f"{network} has no place for {name}: only networks with attention in every block can change names."
            )
        for old, new in _TO_TIMM if to_timm else _TO_HALODET:
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return renamed


def _is_network(name: str, prefix: str) -> bool:
    return name.startswith(prefix) if prefix else not name.startswith(_HEADS)


def _fill(
    source: str, network: dict[str, Tensor], others: dict[str, Tensor], into: Mapping[str, Tensor], prefix: str | None
) -> Conversion:
    prefix = prefix or backbone_prefix(into)
    if not prefix:
        raise CheckpointError(
            f"what is to be filled is no detector: none of its names begins with {' or '.join(PREFIXES)}."
        )
    for name, tensor in network.items():
        there = into.get(prefix + name)
        if there is not None and there.shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, but {tuple(there.shape)} in the detector: another network."
            )
    filled = {prefix + name: tensor for name, tensor in network.items() if prefix + name in into}
    backbone = [name for name in into if name.startswith(prefix) and _NETWORK.match(name[len(prefix) :])]
    if not filled:
        raise CheckpointError(
            f"no tensor fits the detector, whose backbone begins with {backbone[0] if backbone else prefix + '*'}."
        )
    left_out = {name: tensor for name, tensor in network.items() if prefix + name not in into} | others
    unfilled = [name for name in backbone if name not in filled]
    return Conversion(
        source, {name: filled.get(name, tensor) for name, tensor in into.items()}, left_out, len(filled), unfilled
    )
