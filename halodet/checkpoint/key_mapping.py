"""The same layer under other names: one small table of renamings for each kind of file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from halodet.checkpoint.model_spec import BACKBONE, ModelSpec

Rename = Callable[[str], str]

# torchvision's and timm's ResNets -> Detectron2's.
TORCHVISION = [
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"(^|\.)bn(\d)\.", r"\1conv\2.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^conv1\.", "stem.conv1."),
]
# Detectron2's ResNets -> HaloNet, whose mixer stands where theirs have the 3×3 convolution.
DETECTRON2 = [
    (r"^(stem\.conv1|res\d\.\d+\.(?:conv1|conv3|shortcut))\.weight$", r"\1.conv.weight"),
    (r"^(res\d\.\d+\.)conv2\.weight$", r"\1mixer.conv.weight"),
    (r"^(res\d\.\d+\.)conv2\.norm\.", r"\1norm2."),
]
# A classifier's last layers: HaloNet's and timm's, torchvision's, its conversion to Detectron2's names, MSRA's.
CLASSIFIER = re.compile(r"^(stem\.fc|head|fc|fc1000|linear|classifier)\.")
FINAL_CONV = "final_conv."  # timm's, which a detector may do without


def renamings(target: ModelSpec, names: Iterable[str]) -> dict[str, Rename]:
    """The renamings that may lead from the names of a file to those of a model, by a description for the user, the plainest first."""
    alone = not any(BACKBONE.match(name) for name in names)

    def into_backbone(rename: Rename) -> Rename:
        def renamed(name: str) -> str:
            inside = BACKBONE.match(name)
            if not inside and not alone:
                return name
            return target.backbone + rename(name[inside.end() :] if inside else name)

        return renamed

    found: dict[str, Rename] = {
        "the model's own names": lambda name: name,
        "the backbone's names": into_backbone(lambda name: name),
    }
    if target.kind == "halonet":
        found["Detectron2's ResNet names"] = into_backbone(lambda name: substitute(name, DETECTRON2))
        found["torchvision's ResNet names"] = into_backbone(
            lambda name: substitute(substitute(name, TORCHVISION), DETECTRON2)
        )
    elif target.kind == "resnet":
        found["torchvision's ResNet names"] = into_backbone(lambda name: substitute(name, TORCHVISION))
    return found


def by_suffix(target: ModelSpec, names: Iterable[str]) -> Rename:
    """Detectron2's matching heuristics: a tensor of the model takes the file's with the longest name that is the end of its own."""
    known, taken = set(names), {}
    for name in target.shapes:
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        end = next((e for e in ends if e in known), None)
        if end is not None:
            taken[end] = None if end in taken else name  # two that claim the same tensor: neither is sure of it
    return lambda name: taken.get(name) or name


def substitute(name: str, rules: list[tuple[str, str | Callable]]) -> str:
    """``name`` after every rule (pattern, replacement), in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def shared_prefixes(names: Iterable[str]) -> list[str]:
    """The dotted beginnings that all names share, from none to the longest: what a wrapper may have put before them."""
    names = list(names)
    first = names[0].split(".")[:-1] if names else []
    found = [""]
    for part in first:
        prefix = f"{found[-1]}{part}."
        if not all(name.startswith(prefix) for name in names):
            break
        found.append(prefix)
    return found
