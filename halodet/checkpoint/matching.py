"""Match the tensors of a checkpoint with those of a model, by name and shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from halodet.checkpoint.class_names import classes_of, is_predictor, select_classes, show_classes
from halodet.checkpoint.io import summarize
from halodet.checkpoint.key_mapping import CLASSIFIER, FINAL_CONV, Rename, by_suffix, key_mappings, shared_prefixes
from halodet.checkpoint.model_spec import BACKBONE, NOT_WEIGHTS, ModelSpec, group_of
from halodet.checkpoint.preprocessing import adapt_stem, preprocessing_of, same_mean

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

STATISTICS = re.compile(r"\.running_(mean|var)$")
Layout = dict[str, int]


@dataclass(frozen=True)
class TensorSource:
    """How to make the value of one tensor of the model.

    Args:
        make: returns the value.
        resized: whether it is a resized relative position table.
    """

    make: Callable[[], Tensor]
    resized: bool = False


@dataclass
class Match:
    """Result of :func:`match`.

    Args:
        spec: the model.
        key_mapping: description of the key mapping in use.
        sources: source of each tensor of the model that the file provides, by name.
        mismatched: shapes in the file and in the model of tensors that agree only in their names.
        initialized: names of the predictors' tensors that stay initialized, because the file has other classes.
        expected: names of the model's tensors that a file of this kind should provide.
        unexpected: names of the file's tensors without a counterpart in the model.
        surplus: number of unexpected tensors in the groups of modules that the model has, which hint at another
            architecture.
        unused: names of the file's tensors of a classification head.
        notes: remarks for the user.
        whole: whether the file holds a detector, or part of one, and not only a backbone.
        layouts: layouts of a relative position table in the file and in the model, if ``exact`` is set and they differ.
    """

    spec: ModelSpec
    key_mapping: str = "none"
    sources: dict[str, TensorSource] = field(default_factory=dict)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    initialized: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    surplus: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: bool = False
    layouts: tuple[Layout, Layout] | None = None

    @property
    def missing(self) -> list[str]:
        """Names of the expected tensors that the file does not have."""
        return [name for name in self.expected if name not in self.sources and name not in self.mismatched]

    @property
    def score(self) -> tuple[int, int]:
        """Number of tensors that match, then of those whose names match."""
        return len(self.sources), len(self.sources) + len(self.mismatched)


def match(spec: ModelSpec, checkpoint: Mapping[str, Any], *, exact: bool = False) -> Match:
    """Find the key mapping under which ``checkpoint`` provides most tensors of a model. Nothing is copied.

    Args:
        spec: the model.
        checkpoint: as :func:`halodet.checkpoint.io.read_checkpoint` returns it.
        exact: whether the file must be of this very model: only a wrapper's prefix may differ, and nothing is adapted.
    """
    tensors = {name: value for name, value in checkpoint["model"].items() if not NOT_WEIGHTS.search(name)}
    if checkpoint.get("__author__") == "Caffe2":
        tensors, _ = convert_c2_detectron_names(tensors)
    best, best_names = Match(spec), {}
    for prefix in shared_prefixes(tensors):
        names = {name.removeprefix(prefix): value for name, value in tensors.items()}
        candidates = key_mappings(spec, names)
        if exact:
            candidates = {"none": candidates["none"]}
        if checkpoint.get("matching_heuristics"):
            candidates["Detectron2 matching heuristics"] = by_suffix(spec, names)
        for description, rename in candidates.items():
            found = _match_under(spec, names, description, rename, checkpoint.get("metadata") or {}, exact)
            if not best_names or found.score > best.score:
                best, best_names = found, names
                if prefix:
                    found.notes.insert(0, f"removed prefix {prefix} from the file's names")
    if not exact:
        _add_statistics(best, checkpoint, best_names)
        _adapt_preprocessing(best, checkpoint, best_names)
        _adapt_classes(best, checkpoint, best_names)
        _note_stride(best, checkpoint)
    _set_expected(best, best_names)
    return best


def _match_under(
    spec: ModelSpec,
    names: dict[str, Tensor],
    description: str,
    rename: Rename,
    metadata: Mapping[str, Any],
    exact: bool,
) -> Match:
    found = Match(spec, description)
    bare = not any(BACKBONE.match(name) for name in names)
    groups = {group_of(name, spec.backbone) for name in spec.shapes}
    replaced: list[str] = []
    statistics = 0
    resized: dict[str, None] = {}
    for name, value in names.items():
        goal, shape = rename(name), tuple(value.shape)
        if _is_resnet(description) and spec.in_replaced_mixer(goal):
            replaced.append(name)
        elif goal in spec.shapes:
            owner = spec.tables.get(goal)
            old = owner.infer_rel_pos_layout(len(value), metadata) if owner is not None and value.ndim == 2 else {}
            new = owner.rel_pos_layout() if old else {}
            if old != new and exact:
                found.layouts = old, new
            table = owner.resize_rel_pos(value, old) if old != new and not exact else None
            if table is not None and tuple(table.shape) == spec.shapes[goal]:
                sizes = (", ".join(f"{key}={size}" for key, size in layout.items()) for layout in (old, new))
                resized["resized relative position tables from {} to {}".format(*sizes)] = None
                found.sources[goal] = TensorSource(partial(_identity, table), resized=True)
            elif shape == spec.shapes[goal]:
                found.sources[goal] = TensorSource(partial(_identity, value))
            else:
                found.mismatched[goal] = (shape, spec.shapes[goal])
        elif bare and (CLASSIFIER.match(name) or name.startswith(FINAL_CONV)):
            found.unused.append(name)
        elif STATISTICS.search(goal) and STATISTICS.sub(".weight", goal) in spec.shapes:
            statistics += 1
            found.surplus["norms"] += exact
        else:
            found.unexpected.append(name)
            group = group_of(goal, spec.backbone)
            found.surplus[group] += group in groups
    if replaced:
        found.notes.append(
            f"skipped 3x3 weights of blocks that use attention or another mixer here: {summarize(replaced)}"
        )
    if statistics:
        found.notes.append(f"skipped {statistics} batch norm statistics, which the model's norm layers do not have")
    found.notes += resized
    found.whole = any(not name.startswith(spec.backbone) for name in (*found.sources, *found.mismatched))
    return found


def _add_statistics(found: Match, checkpoint: Mapping[str, Any], names: dict[str, Tensor]) -> None:
    """Add the statistics of Caffe2's ResNets, whose norm layers are folded to a scale and a shift: mean 0 and variance
    1."""
    if checkpoint.get("__author__") != "Caffe2" or any("_gn_" in name for name in checkpoint["model"]):
        return
    spec = found.spec
    goals = [n for n in spec.shapes if STATISTICS.search(n) and STATISTICS.sub(".weight", n) in found.sources]
    resnet = _is_resnet(found.key_mapping) or spec.kind == "resnet"
    if not resnet or not goals or any(STATISTICS.search(name) for name in names):
        return
    for goal in goals:
        make = torch.zeros if goal.endswith("mean") else torch.ones
        found.sources[goal] = TensorSource(partial(make, spec.shapes[goal]))
    note = "set running means to 0 and variances to 1, because the file's norm layers are folded"
    if spec.norm != "FrozenBN":
        note += f"; this is right for FrozenBN only, and the model has {spec.norm}"
    found.notes.append(note)


def _adapt_preprocessing(found: Match, checkpoint: Mapping[str, Any], names: dict[str, Tensor]) -> None:
    """Adapt the first convolution from the preprocessing of the file to that of the model."""
    stem, new = found.spec.stem, found.spec.preprocessing
    if (
        found.whole
        and checkpoint.get("__author__") != "Caffe2"
        and "pixel_std" not in (checkpoint.get("metadata") or {})
    ):
        if new:
            found.notes.append(f"the file does not name its preprocessing; assumed that of the config, {new}")
        return
    old = preprocessing_of(checkpoint, found.key_mapping, set(names))
    if stem not in found.sources or old is None or new is None:
        return
    if not same_mean(old, new):
        found.notes.append(
            f"MODEL.PIXEL_MEAN differs from the file's ({old.order} {old.mean}), so the features differ. Fix: set it"
        )
    if (old.order, old.std) != (new.order, new.std):
        make = found.sources[stem].make
        found.sources[stem] = TensorSource(lambda: adapt_stem(make(), old, new))
        found.notes.append(f"adapted the stem convolution from {old} to {new}")


def _adapt_classes(found: Match, checkpoint: Mapping[str, Any], names: Mapping[str, Tensor]) -> None:
    """Select the predictors' rows of the model's classes by name; predictors for other classes stay initialized."""
    old, new = ([entry["name"] for entry in classes or ()] for classes in (classes_of(checkpoint), found.spec.classes))
    differ, selected = bool(old and new and old != new), 0
    for name in [name for name in (*found.sources, *found.mismatched) if is_predictor(name)]:
        shape = found.spec.shapes[name]
        if differ and name in names:
            value = select_classes(name, names[name], old, new, shape[0])
            fits = value is not None and tuple(value.shape) == shape
            if fits:
                selected += value is not names[name]
                found.sources[name] = TensorSource(partial(_identity, value))
                found.mismatched.pop(name, None)
        else:
            fits = name in found.sources or (found.mismatched[name][0][1:] != shape[1:] and "point_head" not in name)
        if not fits:
            found.sources.pop(name, None)
            found.mismatched.pop(name, None)
            found.initialized.append(name)
    if selected:
        found.notes.append(f"selected the rows of the classes {show_classes(new)} by name in {selected} tensors")
    if found.initialized:
        reason = "because the file has other classes or another kind of predictor"
        found.notes.append(f"left initialized, {reason}: {summarize(found.initialized)}")


def _note_stride(found: Match, checkpoint: Mapping[str, Any]) -> None:
    if not found.sources or found.spec.kind == "other":
        return
    author, in_1x1 = checkpoint.get("__author__"), found.spec.stride_in_1x1
    if author == "Caffe2" and not in_1x1:
        found.notes.append(
            "MSRA's ResNets have their strides in the 1x1 convolutions, this model in the 3x3; torchvision's "
            "weights fit better"
        )
    elif (author == "torchvision" or found.key_mapping.startswith("torchvision")) and in_1x1:
        found.notes.append(
            "torchvision's ResNets have their strides in the 3x3 convolutions, this model in the 1x1. Fix: "
            "MODEL.RESNETS.STRIDE_IN_1X1 False"
        )


def _set_expected(found: Match, names: Mapping[str, Tensor]) -> None:
    """Set what the file should provide: the backbone or the whole model, without what a ResNet lacks if it is one."""
    spec = found.spec
    part = [name for name in spec.shapes if found.whole or name.startswith(spec.backbone)]
    found.expected = [name for name in part if name not in found.initialized]
    if not _is_resnet(found.key_mapping):
        return
    lacks_se = not any(".se." in name for name in names)
    absent: dict[str, list[str]] = {}
    for name in found.expected:
        if spec.in_replaced_mixer(name):
            absent.setdefault("other mixers", []).append(name)
        elif ".se." in name.removeprefix(spec.backbone) and lacks_se:
            absent.setdefault("squeeze-excitation", []).append(name)
        elif not spec.detector and CLASSIFIER.match(name):
            absent.setdefault("the classifier", []).append(name)
    if absent:
        counts = ", ".join(f"{len(group)} tensors of {part}" for part, group in absent.items())
        found.notes.append(f"a ResNet does not provide {counts}")
        gone = {name for group in absent.values() for name in group}
        found.expected = [name for name in found.expected if name not in gone]


def _is_resnet(key_mapping: str) -> bool:
    return key_mapping.endswith("ResNet")


def _identity(value: Tensor) -> Tensor:
    return value
