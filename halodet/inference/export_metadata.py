"""The description that is stored in an exported model file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from halodet import __version__
from halodet.errors import HalodetError, ImageError

__all__ = [
    "BACKBONE",
    "FORMAT_VERSION",
    "METADATA_KEY",
    "OUTPUTS",
    "TORCHSCRIPT_FILE",
    "ExportMetadata",
    "ExportedModelError",
    "PredictionError",
]

FORMAT_VERSION = 1
METADATA_KEY = "halodet"  # in ONNX's metadata_props and in OpenVINO's rt_info
TORCHSCRIPT_FILE = "halodet.json"  # extra file of a TorchScript archive
OUTPUTS = ("boxes", "scores", "classes", "masks", "sem_seg")
BACKBONE = "backbone"  # ``detector`` of a file that has a backbone only; its outputs are feature maps
_PANOPTIC = "overlap_threshold, stuff_area_limit, instances_confidence_threshold"
_PRECISIONS = ("float32", "float16", "int8")
SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript", "openvino": ".xml", "pt2": ".pt2"}  # of each format


class ExportedModelError(HalodetError, ValueError):
    """An exported model file cannot be used."""


class PredictionError(ExportedModelError, ImageError):
    """An exported model failed on an image."""


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """Description of an exported model: what it takes, what it returns, and how its outputs are processed.

    Attributes:
        detector: name of the meta-architecture.
        input_format: order of the input's channels, ``"BGR"`` or ``"RGB"``.
        min_size: length to which the shorter side of an image is resized; 0 for no resizing.
        max_size: maximum length of the longer side of a resized image.
        classes: dataset id and name of each class of objects.
        outputs: names of the outputs, some of :data:`OUTPUTS`.
        weights_sha256: SHA-256 of the weights that were exported.
        stuff_classes: name of each class of the semantic segmentation.
        score_threshold: minimum score of the objects that the model returns.
        mask_threshold: minimum probability of the pixels of a mask.
        sem_seg_stride: input pixels per pixel of ``sem_seg``.
        panoptic: ``overlap_threshold``, ``stuff_area_limit`` and ``instances_confidence_threshold``; None without
            panoptic segmentation.
        precision: ``"float32"``, ``"float16"`` or ``"int8"``.
        halodet: version of halodet that exported the model.
        format_version: version of this description.

    Raises:
        ExportedModelError: a value is invalid.
    """

    detector: str
    input_format: str
    min_size: int
    max_size: int
    classes: list[dict[str, Any]]
    outputs: list[str]
    weights_sha256: str
    stuff_classes: list[str] = field(default_factory=list)
    score_threshold: float = 0.0
    mask_threshold: float = 0.5
    sem_seg_stride: int = 4
    panoptic: dict[str, float] | None = None
    precision: str = "float32"
    halodet: str = __version__
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        instances = {"boxes", "scores", "classes"}
        names = set(self.outputs) if _is_list(self.outputs, str) else set()
        checks = [
            ("format_version", self.format_version == FORMAT_VERSION, f"{FORMAT_VERSION}"),
            ("halodet", isinstance(self.halodet, str), "a version"),
            ("detector", isinstance(self.detector, str) and self.detector, "the name of a meta-architecture"),
            ("input_format", self.input_format in ("BGR", "RGB"), "'BGR' or 'RGB'"),
            ("min_size", _is_int(self.min_size, 0), "an integer of at least 0"),
            ("max_size", _is_int(self.max_size, 1), "a positive integer"),
            ("classes", _are_classes(self.classes), "a list of objects with an integer id and a name"),
            ("stuff_classes", _is_list(self.stuff_classes, str), "a list of names"),
            ("score_threshold", _is_share(self.score_threshold), "a number from 0 to 1"),
            ("mask_threshold", _is_share(self.mask_threshold), "a number from 0 to 1"),
            (
                "outputs",
                names and (self.detector == BACKBONE or names <= set(OUTPUTS)),
                f"a list of some of {', '.join(OUTPUTS)}",
            ),
            ("outputs", instances <= names or not names & {*instances, "masks"}, "boxes, scores and classes together"),
            ("sem_seg_stride", _is_int(self.sem_seg_stride, 1), "a positive integer"),
            (
                "panoptic",
                self.panoptic is None or _is_panoptic(self.panoptic),
                f"null or {_PANOPTIC}",
            ),
            ("panoptic", self.panoptic is None or {"masks", "sem_seg"} <= names, "null without masks and sem_seg"),
            ("weights_sha256", bool(re.fullmatch("[0-9a-f]{64}", str(self.weights_sha256))), "64 hexadecimal digits"),
            ("precision", self.precision in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}"),
        ]
        for name, valid, expected in checks:
            if not valid:
                raise _invalid(name, getattr(self, name), expected)

    def to_json(self) -> str:
        """Return the description as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ExportMetadata:
        """Read a description; unknown keys are ignored.

        Raises:
            ExportedModelError: the text is not JSON, a key is missing or invalid, or a newer halodet wrote it.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ExportedModelError(f"metadata is not JSON ({error}). Fix: export the model again.") from error
        if not isinstance(values, Mapping):
            raise _invalid("metadata", values, "an object")
        version = values.get("format_version")
        if _is_int(version, FORMAT_VERSION + 1):
            raise ExportedModelError(
                f"format_version={version} is invalid: expected at most {FORMAT_VERSION}. Fix: update halodet"
                + (f" to {values['halodet']} or newer." if values.get("halodet") else ".")
            )
        for entry in fields(cls):
            required = entry.default is MISSING and entry.default_factory is MISSING
            if entry.name not in values and (required or entry.name == "format_version"):
                raise ExportedModelError(f"metadata has no {entry.name}. Fix: export the model again.")
        return cls(**{entry.name: values[entry.name] for entry in fields(cls) if entry.name in values})


def _invalid(name: str, value: Any, expected: str) -> ExportedModelError:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text if len(text) <= 100 else f"{text[:100]}..."
    return ExportedModelError(f"metadata {name}={text} is invalid: expected {expected}. Fix: export the model again.")


def _is_int(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _are_classes(value: Any) -> bool:
    return _is_list(value, dict) and all(
        _is_int(entry.get("id"), -(2**63)) and isinstance(entry.get("name"), str) for entry in value
    )


def _is_panoptic(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == set(_PANOPTIC.split(", ")) and all(map(_is_number, value.values()))
