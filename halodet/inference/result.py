"""Result of a detector for one image."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halodet.errors import HalodetError
from halodet.inference.detections import Detections, to_coco, to_numpy
from halodet.inference.postprocessing import combine_panoptic
from halodet.inference.visualize import draw_output
from halodet.utils.io import atomic_write, write_json

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import supervision

__all__ = ["Result", "ResultError"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ResultError(HalodetError, ValueError):
    """A result cannot be saved or converted."""


class Result:
    """What a detector finds in one image; a panoptic or semantic model finds segments too.

    ``len(result)`` is the number of objects. Indexing with a mask, slice, integer array or integer returns the result
    with the selected objects; segments stay.

    Args:
        image: (H, W, 3) uint8 BGR image.
        output: what :meth:`Predictor.predict` returns for the image.
        classes: dataset id and name of each class of things.
        stuff_classes: name of each semantic class.
        file_name: name of the image file; None for an image that is no file.
        panoptic: arguments of :func:`~halodet.inference.postprocessing.combine_panoptic` that the panoptic segments
            were combined with; None if they are unknown.

    Attributes:
        image: the image.
        file_name: name of the image file, or None.
        classes: dataset id and name of each class of things.
        stuff_classes: name of each semantic class.
        detections: the objects, a :class:`~halodet.inference.Detections`.
        sem_seg: (H, W) semantic class of each pixel; None without one.
        panoptic_seg: (H, W) segment of each pixel, 0 for none, and a list of descriptions of the segments, as
            Detectron2 has them; None without segments.
    """

    def __init__(
        self,
        image: np.ndarray,
        output: Mapping[str, Any],
        classes: Sequence[Mapping[str, Any]],
        stuff_classes: Sequence[str] = (),
        file_name: str | None = None,
        panoptic: Mapping[str, float] | None = None,
    ) -> None:
        self.file_name, self._panoptic = file_name, panoptic
        self.image, self.classes, self.stuff_classes = image, list(classes), list(stuff_classes)
        self._output = dict(output)
        found = output.get("instances")
        if found is None:
            found = Detections(image.shape[:2], np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int))
        elif not isinstance(found, Detections):
            found = self._output["instances"] = Detections.from_instances(found)
        self.detections: Detections = found
        self.sem_seg: np.ndarray | None = None
        if "sem_seg" in output:
            values = to_numpy(output["sem_seg"])
            self.sem_seg = values.argmax(0) if values.ndim == 3 else values
            self._output["sem_seg"] = self.sem_seg
        self.panoptic_seg: tuple[np.ndarray, list[dict[str, Any]]] | None = None
        if "panoptic_seg" in output:
            self.panoptic_seg = to_numpy(output["panoptic_seg"][0]), output["panoptic_seg"][1]

    @classmethod
    def of(cls, predictor: Any, image: np.ndarray, output: Mapping[str, Any], file_name: str | None = None) -> Result:
        """Return the result of what a predictor, or another object with its attributes, returned for an image."""
        panoptic = getattr(predictor, "panoptic", None)
        return cls(image, output, predictor.classes, predictor.stuff_classes, file_name, panoptic)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.detections.image_size

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) x1, y1, x2, y2 in pixels."""
        return self.detections.boxes

    @property
    def scores(self) -> np.ndarray:
        """(N,) scores."""
        return self.detections.scores

    @property
    def labels(self) -> np.ndarray:
        """(N,) index of the class, into :attr:`classes`."""
        return self.detections.classes

    @property
    def names(self) -> list[str]:
        """Name of the class of each object."""
        return [self.classes[int(k)]["name"] for k in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool; None without masks."""
        return self.detections.masks

    @property
    def keypoints(self) -> np.ndarray | None:
        """(N, K, 3) x, y and score; None without keypoints."""
        return self.detections.keypoints

    @property
    def track_ids(self) -> np.ndarray | None:
        """(N,) number of the track of each object, -1 for none; None without tracking."""
        return self.detections.track_ids

    def __len__(self) -> int:
        return len(self.detections)

    def __getitem__(self, item: Any) -> Result:
        output = {**self._output, "instances": self.detections[item]}
        if self.panoptic_seg is not None:
            rows = np.arange(len(self))[item].reshape(-1).tolist()
            output["panoptic_seg"] = self.panoptic_seg[0], _renumbered(self.panoptic_seg[1], rows)
        selected = self._with(output)
        selected._panoptic = None  # segments stay, also those of other objects
        return selected

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        parts = []
        if len(self) or self.panoptic_seg is None and self.sem_seg is None:
            counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
            parts.append(f"{len(self)} object{'s' * (len(self) != 1)}{': ' * bool(counts)}{counts}")
        if self.panoptic_seg is not None:
            parts.append(f"{len(self.panoptic_seg[1])} segments")
        elif self.sem_seg is not None:
            parts.append(f"{len(np.unique(self.sem_seg[self.sem_seg >= 0]))} semantic classes")
        name = "" if self.file_name is None else f"{os.path.basename(self.file_name)}, "
        return f"<Result {name}{width}x{height} pixels, {'; '.join(parts)}>"

    def filter(self, score_threshold: float = 0.0, names: Collection[str] | None = None) -> Result:
        """Return the result with the objects and segments of at least a score, of the classes with these names.

        Panoptic segments are combined again if the score is above that of their combination, so that what an object
        below it covered is not empty. They are not after a selection of objects or names: select by score first.
        Without panoptic segments, ``sem_seg`` is -1 at the pixels of other classes.

        Args:
            score_threshold: minimum score; segments without a score stay.
            names: names of classes; None for all.

        Raises:
            ResultError: the model has no class of a name.
        """
        known = [*(entry["name"] for entry in self.classes), *self.stuff_classes]
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            near = ", ".join(difflib.get_close_matches(unknown[0], known) or known[:3])
            raise ResultError(f"{unknown[0]} is none of the {len(known)} classes of the model; similar: {near}.")
        if self._panoptic is not None and score_threshold > self._panoptic["instances_confidence_threshold"]:
            return self._combined(self._panoptic, score_threshold).filter(score_threshold, names)
        output = dict(self._output)
        kept = self.scores >= score_threshold
        if names is not None:
            kept &= np.array([name in names for name in self.names], bool)
        if "instances" in output:
            output["instances"] = self.detections[kept]
        if "proposals" in output:
            output["proposals"] = output["proposals"][
                output["proposals"].objectness_logits.sigmoid() >= score_threshold
            ]
        if self.panoptic_seg is not None:
            ids, infos = self.panoptic_seg
            infos = [
                info
                for info in infos
                if info.get("score", 1.0) >= score_threshold and (names is None or self.segment_name(info) in names)
            ]
            infos = _renumbered(infos, np.flatnonzero(kept).tolist())
            output["panoptic_seg"] = np.where(np.isin(ids, [info["id"] for info in infos]), ids, 0), infos
        elif self.sem_seg is not None and names is not None:
            kept = np.isin(self.sem_seg, [k for k, name in enumerate(self.stuff_classes) if name in names])
            output["sem_seg"] = np.where(kept, self.sem_seg, -1)
        filtered = self._with(output)
        if names is not None:
            filtered._panoptic = None  # other classes must not come back
        return filtered

    def with_track_ids(self, track_ids: np.ndarray) -> Result:
        """Return the result with the track of each object, also in the descriptions of panoptic segments.

        Args:
            track_ids: (N,) number of the track of each object, -1 for none.
        """
        output = {**self._output, "instances": dataclasses.replace(self.detections, track_ids=track_ids)}
        if self.panoptic_seg is not None:
            ids, infos = self.panoptic_seg
            output["panoptic_seg"] = (
                ids,
                [
                    {**info, "track_id": int(track_ids[info["instance_id"]])} if "instance_id" in info else info
                    for info in infos
                ],
            )
        return self._with(output)

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """Convert the objects to COCO annotations with a ``score``, see :func:`~halodet.inference.to_coco`."""
        annotations = to_coco(self.detections, image_id, [entry["id"] for entry in self.classes])
        for k, annotation in enumerate(annotations):
            box, masks = annotation["bbox"], self.masks
            annotation["area"] = box[2] * box[3] if masks is None else float(masks[k].sum())
            annotation["iscrowd"] = 0
        return annotations

    def to_supervision(self) -> supervision.Detections:
        """Convert the objects to ``supervision.Detections``, with the names as ``data["class_name"]``.

        Raises:
            ResultError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ResultError("supervision is not installed. Fix: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=self.masks,
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            tracker_id=self.track_ids,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self) -> Image.Image:
        """Draw the result on the image; see :func:`~halodet.inference.draw` for the size of the drawing."""
        names = [entry["name"] for entry in self.classes]
        drawing = draw_output(self.image, self._output, names, self.stuff_classes, threshold=0.0)
        return Image.fromarray(np.ascontiguousarray(drawing[:, :, ::-1]))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Save the drawing (.jpg, .png, .webp), or the objects as a COCO dataset of one image (.json).

        Raises:
            ResultError: another suffix, or the file cannot be written.
        """
        path = Path(file)
        suffix = path.suffix.lower()
        try:
            if suffix == ".json":
                write_json(path, self.to_dataset(os.path.basename(self.file_name or path.stem)))
            elif suffix in _SUFFIXES:
                drawing = self.draw()
                kind = Image.registered_extensions()[suffix]
                atomic_write(path, lambda temporary: drawing.save(temporary, kind, quality=95))
            else:
                raise ResultError(f"{path} is invalid: expected a name that ends in {', '.join(_SUFFIXES)} or .json.")
        except OSError as error:
            raise ResultError(f"{path} cannot be written ({error.strerror or error}).") from error

    def to_dataset(self, file_name: str = "") -> dict[str, Any]:
        """Return the objects as a COCO dataset of one image: ``images``, ``annotations`` and ``categories``."""
        height, width = self.image.shape[:2]
        return {
            "images": [{"id": 1, "file_name": file_name, "width": width, "height": height}],
            "annotations": [{"id": k, **annotation} for k, annotation in enumerate(self.to_coco(), start=1)],
            "categories": [{"id": entry["id"], "name": entry["name"]} for entry in self.classes],
        }

    def _with(self, output: Mapping[str, Any]) -> Result:
        return Result(self.image, output, self.classes, self.stuff_classes, self.file_name, self._panoptic)

    def _combined(self, options: Mapping[str, float], score_threshold: float) -> Result:
        """Return the objects of at least a score, and the panoptic segments of these."""
        result, options = self[self.scores >= score_threshold], {**options}
        options["instances_confidence_threshold"] = score_threshold
        result._panoptic = options
        if self.panoptic_seg is not None and self.sem_seg is not None and result.masks is not None:
            segments = combine_panoptic(result.detections, self.sem_seg, **options)
            result.panoptic_seg = result._output["panoptic_seg"] = segments
            if result.track_ids is not None:
                return result.with_track_ids(result.track_ids)
        return result

    def segment_name(self, info: Mapping[str, Any]) -> str:
        """Return the name of the class of a panoptic segment, from its description."""
        index = info["category_id"]
        names = [entry["name"] for entry in self.classes] if info["isthing"] else self.stuff_classes
        return str(names[index]) if index < len(names) else f"class {index}"


def _renumbered(infos: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return segments whose ``instance_id`` is the new row of their object; it is removed where there is none.

    Args:
        infos: descriptions of the segments.
        rows: old row of each new row.
    """
    new = {old: row for row, old in enumerate(rows)}
    renumbered = []
    for info in infos:
        info = dict(info)
        if "instance_id" in info:
            row = new.get(info.pop("instance_id"))
            info |= {} if row is None else {"instance_id": row}
        renumbered.append(info)
    return renumbered
