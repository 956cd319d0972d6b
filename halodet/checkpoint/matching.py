"""Whose tensor goes where: which tensor of a checkpoint fills which one of a model, under which name, and how it is adapted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from halodet.checkpoint.key_mapping import CLASSIFIER, FINAL_CONV, Rename, by_suffix, renamings, shared_prefixes
from halodet.checkpoint.model_spec import BACKBONE, NOT_WEIGHTS, ModelSpec, group_of
from halodet.checkpoint.preprocessing import Preprocessing, adapt_stem, preprocessing_of, same_mean
from halodet.checkpoint.rel_pos import TABLE, block_and_halo, resize_table

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

STATISTICS = re.compile(r"\.running_(mean|var)$")


@dataclass(frozen=True)
class TensorSource:
    """How one tensor of the model is filled: ``make`` gives the values, ``resized`` says that it is a table of another length."""

    make: Callable[[], Tensor]
    resized: bool = False


@dataclass
class Match:
    """What :func:`match` found.

    Args:
        target: the model.
        naming: the names by which the file was understood.
        fills: by name of the model's tensors, those that the file fills.
        mismatched: shapes in the file and in the model of tensors that have the same name only.
        expected: the model's tensors that a file of this kind should fill.
        unexpected: the file's tensors that have no place in the model.
        foreign: those of them that belong to parts the model has: a network of another depth or kind. Part -> count.
        not_used: the file's tensors that belong to a classifier.
        notes: sentences for the user.
        whole: the file holds (a part of) a whole detector, not a backbone alone.
        window: block and halo of attention in the file and in the model, where ``exact`` is asked for and they differ.
    """

    target: ModelSpec
    naming: str = ""
    fills: dict[str, TensorSource] = field(default_factory=dict)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    expected: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    foreign: Counter[str] = field(default_factory=Counter)
    not_used: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: bool = False
    window: tuple[tuple[int, int], tuple[int, int]] | None = None

    @property
    def missing(self) -> list[str]:
        """The model's tensors, of those expected, for which the file has nothing."""
        return [name for name in self.expected if name not in self.fills and name not in self.mismatched]

    @property
    def score(self) -> tuple[int, int]:
        """How well the names fit: tensors filled, then tensors found."""
        return len(self.fills), len(self.fills) + len(self.mismatched)


def match(target: ModelSpec, checkpoint: Mapping[str, Any], *, exact: bool = False) -> Match:
    """Find the naming under which ``checkpoint`` fills most of ``target``, and what it fills; nothing is copied.

    Args:
        target: the model.
        checkpoint: as :func:`halodet.checkpoint.io.read_checkpoint` returns it.
        exact: the file must be of this very model: names may differ by a wrapper's prefix, and nothing is adapted.
    """
    tensors = {name: value for name, value in checkpoint["model"].items() if not NOT_WEIGHTS.search(name)}
    if checkpoint.get("__author__") == "Caffe2":
        tensors, _ = convert_c2_detectron_names(tensors)
    best: Match | None = None
    for prefix in shared_prefixes(tensors):
        names = {name.removeprefix(prefix): value for name, value in tensors.items()}
        ways = renamings(target, names)
        if exact:
            ways = dict(list(ways.items())[:1])
        if checkpoint.get("matching_heuristics"):
            ways["Detectron2's matching heuristics"] = by_suffix(target, names)
        for naming, rename in ways.items():
            found = _under(target, names, naming, rename, checkpoint, exact)
            if best is None or found.score > best.score:
                best = found
                best_names = names
                if prefix:
                    found.notes.insert(0, f"prefix {prefix} taken off the file's names")
    if best is None:  # a file without tensors
        best, best_names = Match(target), {}
    if not exact:
        if checkpoint.get("__author__") == "Caffe2" and not any("_gn_" in name for name in checkpoint["model"]):
            _unfold_norms(best, best_names)
        says = checkpoint.get("__author__") == "Caffe2" or "pixel_std" in (checkpoint.get("metadata") or {})
        if not best.whole or says:
            _adapt_input(best, checkpoint, best_names)
        elif target.convention:
            best.notes.append(
                f"the file does not say on which pixels it was trained: it must be those of the config, {target.convention}"
            )
        _note_stride(best, checkpoint)
    _expect(best, best_names)
    return best


def _under(
    target: ModelSpec, names: dict[str, Tensor], naming: str, rename: Rename, checkpoint: Mapping[str, Any], exact: bool
) -> Match:
    found = Match(target, naming)
    alone = not any(BACKBONE.match(name) for name in names)
    attention: list[str] = []
    statistics: list[str] = []
    pairs: set[tuple[tuple[int, int], tuple[int, int]]] = set()
    groups = {group_of(name, target.backbone) for name in target.shapes}
    for name, value in names.items():
        goal = rename(name)
        shape = tuple(value.shape)
        if _is_resnet(naming) and target.has_attention(goal) and re.search(r"\.(mixer|norm2)\.", goal):
            attention.append(name)
        elif goal in target.shapes:
            old, new = _table_sizes(target, goal, shape, checkpoint)
            if old != new and exact:
                found.window = (old, new)
            if old != new and not exact:
                pairs.add((old, new))
                found.fills[goal] = TensorSource(partial(resize_table, value, old, new), resized=True)
            elif shape == target.shapes[goal]:
                found.fills[goal] = TensorSource(partial(_itself, value))
            else:
                found.mismatched[goal] = (shape, target.shapes[goal])
        elif alone and (CLASSIFIER.match(name) or name.startswith(FINAL_CONV)):
            found.not_used.append(name)
        elif STATISTICS.search(goal) and STATISTICS.sub(".weight", goal) in target.shapes:
            statistics.append(name)
            found.foreign["norms"] += exact
        else:
            found.unexpected.append(name)
            group = group_of(goal, target.backbone)
            found.foreign[group] += group in groups
    if attention:
        found.notes.append(
            f"attention stands where the file has the 3×3 convolutions {some(attention)}: they are left out"
        )
    if statistics:
        found.notes.append("the model's norms keep no statistics: the file's batch norm statistics are left out")
    for old, new in sorted(pairs):
        found.notes.append(
            f"relative tables resized by offset from block {old[0]}, halo {old[1]} (the file's, as far as their length tells) "
            f"to block {new[0]}, halo {new[1]}"
        )
    found.whole = any(not name.startswith(target.backbone) for name in (*found.fills, *found.mismatched))
    return found


def _table_sizes(target: ModelSpec, name: str, shape: tuple[int, ...], checkpoint: Mapping[str, Any]) -> tuple:
    """Block and halo of a relative table in the file and in the model; the same for any other tensor, and for tables of another depth."""
    new = target.windows.get(TABLE.sub(".pos_embed.", name)) if TABLE.search(name) else None
    if new is None or len(shape) != 2 or shape[1:] != target.shapes[name][1:] or shape[0] % 2 == 0:
        return new, new
    old = block_and_halo(shape[0], new, checkpoint.get("metadata") or {})
    return (old, new) if old[0] >= 1 else (new, new)


def _unfold_norms(found: Match, names: dict[str, Tensor]) -> None:
    """A ResNet whose norms are folded to a scale and a shift has mean 0 and variance 1."""
    goals = [n for n in found.target.shapes if STATISTICS.search(n) and STATISTICS.sub(".weight", n) in found.fills]
    resnet = _is_resnet(found.naming) or found.target.kind == "resnet"
    if not resnet or not goals or any(STATISTICS.search(name) for name in names):
        return
    for goal in goals:
        shape = found.target.shapes[goal]
        found.fills[goal] = TensorSource(partial(torch.zeros if goal.endswith("mean") else torch.ones, shape))
    note = "the file's norms are folded to a scale and a shift: running means are 0 and variances 1"
    if found.target.norm != "FrozenBN":
        note += f", which is right for FrozenBN only, and this model's norms are {found.target.norm}"
    found.notes.append(note)


def _adapt_input(found: Match, checkpoint: Mapping[str, Any], names: dict[str, Tensor]) -> None:
    """Turn the first convolution from the pixels that the file's network was trained on to the model's."""
    target = found.target
    stem = target.stem
    old = preprocessing_of(checkpoint, found.naming, set(names))
    new = target.convention
    if stem not in found.fills or old is None or new is None:
        return
    if not same_mean(old, new):
        found.notes.append(
            f"PIXEL_MEAN is not that of the file's network ({old.order} {old.mean}): set it, or its first maps are off"
        )
    if (old.order, old.std) != (new.order, new.std):
        found.fills[stem] = TensorSource(partial(_adapted, found.fills[stem].make, old, new))
        found.notes.append(f"the stem's convolution is turned from {old} to {new}")


def _note_stride(found: Match, checkpoint: Mapping[str, Any]) -> None:
    if not found.fills or found.target.kind == "other":
        return
    in_1x1 = checkpoint.get("__author__") == "Caffe2"
    if in_1x1 and not found.target.stride_in_1x1:
        found.notes.append(
            "MSRA's ResNets halve a map in a stage's first 1×1, this model in the 3×3: torchvision's fit better"
        )
    elif (
        found.naming.startswith("torchvision") or checkpoint.get("__author__") == "torchvision"
    ) and found.target.stride_in_1x1:
        found.notes.append(
            "torchvision's ResNets halve a map in a stage's 3×3, this model in the first 1×1: set STRIDE_IN_1X1 to False"
        )


def _expect(found: Match, names: Mapping[str, Tensor]) -> None:
    """What the file should fill: the backbone or the whole model, less what a ResNet does not have where it comes from one."""
    target = found.target
    wanted = [name for name in target.shapes if found.whole or name.startswith(target.backbone)]
    absent: dict[str, int] = {}
    if _is_resnet(found.naming):
        has_se = any(".se." in name for name in names)
        for name in list(wanted):
            inner = name.removeprefix(target.backbone)
            part = "squeeze-excitation" if ".se." in inner and not has_se else None
            if target.has_attention(name) and re.search(r"\.(mixer|norm2)\.", inner):
                part = "attention"
            if not target.detector and CLASSIFIER.match(inner):
                part = "the classifier"
            if part:
                wanted.remove(name)
                absent[part] = absent.get(part, 0) + 1
    if absent:
        found.notes.append(
            "without counterpart in a ResNet: " + ", ".join(f"{n} tensors of {part}" for part, n in absent.items())
        )
    found.expected = wanted


def _is_resnet(naming: str) -> bool:
    return naming.endswith("ResNet names")


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few of them, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _itself(value: Tensor) -> Tensor:
    return value


def _adapted(make: Callable[[], Tensor], old: Preprocessing, new: Preprocessing) -> Tensor:
    return adapt_stem(make(), old, new)
