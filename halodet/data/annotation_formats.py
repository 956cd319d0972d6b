"""Recognition of annotation files that are not COCO instances json, by their structure.

Each format has a row in a table: its name, what to do with it, and patterns of its content. A file of an unknown
format is not recognized; recognition never fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_HEAD = 1 << 14  # bytes read of a file that is not JSON
_ITEMS = 100  # items of a list or object that are compared
_VALUE = r"(?:[ \t]+[-+]?[\d.]+(?:[eE][-+]?\d+)?)"  # of a line, after its first word


@dataclass(frozen=True)
class _Format:
    """A format of annotations.

    Attributes:
        name: noun phrase that follows "is".
        fix: imperative sentence that follows "Fix:".
        patterns: alternatives, at least one of which the content matches.
    """

    name: str
    fix: str
    patterns: tuple[Any, ...]

    def __str__(self) -> str:
        return f"is {self.name}, not COCO instances json. Fix: {self.fix}."


def _format(name: str, fix: str, *patterns: Any) -> _Format:
    return _Format(name, fix, patterns)


_CONVERT = "export COCO instances json from the tool that wrote it, or convert it, for example with datumaro"
_COMPLETE = "give the whole COCO json, with 'images', 'annotations' and 'categories'"
_DATUMARO = "datum convert -if {} -i FOLDER -f coco_instances -o OUTPUT (of the datumaro package)"
_INSTANCES = "give the instances json of the same images, such as instances_train2017.json"
_UNPACK = "unpack it and give the json that it contains"
_VIA = "open it in VIA 2 and export it with Annotation > Export Annotations (COCO format)"
_CVAT = "export the task from CVAT again with Actions > Export task dataset > COCO 1.0"
_VOC = "give the folder of the xml files instead"
_YOLO = "give the data.yaml of the dataset instead, with names: the class names, and train: the image folder"
_SUPERVISION = "convert its folder with supervision: DetectionDataset.{}(...).as_coco(...)"

# A pattern of parsed JSON. An object matches if it has all keys of the pattern and their values match; the key ... is
# any key. A list matches if one of its items does. A type matches its instances, ... anything, [] and {} any list and
# object, and a function decides itself. The first row that matches counts, so specific rows come first.
_JSON = (
    # COCO's relatives
    _format("COCO captions", _INSTANCES, {"images": [], "annotations": [{"caption": ...}]}),
    _format(
        "COCO panoptic json",
        "give the instances json, or convert it with panopticapi's converters/panoptic2detection_coco_format.py",
        {"annotations": [{"segments_info": []}]},
        [{"segments_info": [], "image_id": ...}],
    ),
    _format(
        "COCO keypoints without boxes and masks",
        "add a 'bbox' to each annotation, or " + _INSTANCES,
        {
            "images": [],
            "annotations": lambda entries: _matches([{"keypoints": []}], entries) and not _has_instances(entries),
        },
    ),
    _format(
        "COCO results, which are detections of a model",
        "give the ground truth json that was evaluated on",
        [{"image_id": ..., "score": ...}],
        [{"image_id": ..., "caption": ...}],
    ),
    _format("a video instance json (YouTube-VIS)", _CONVERT, {"videos": [], "annotations": [], "categories": []}),
    _format(
        "the output of Segment Anything, masks without classes",
        "assign a class to each mask and write them as COCO json",
        {"annotations": [{"predicted_iou": ...}]},
        {"annotations": [{"stability_score": ...}]},
        {"image": {"image_id": ...}, "annotations": []},
        [{"segmentation": ..., "predicted_iou": ...}],
    ),
    _format("only the annotations of a COCO json", _COMPLETE, [{"image_id": ..., "category_id": ...}]),
    # Detectron2, MMDetection and other libraries
    _format(
        "a list of Detectron2 dataset dicts",
        "register it as a dataset and write it with detectron2.data.datasets.convert_to_coco_json",
        [{"file_name": ..., "annotations": [{"bbox_mode": ...}]}],
        [{"file_name": ..., "height": ..., "image_id": ..., "annotations": []}],
    ),
    _format(
        "an annotation file of MMDetection",
        _CONVERT,
        [{"filename": ..., "ann": {}}],
        {"metainfo": {}, "data_list": []},
    ),
    _format(
        "a FiftyOne dataset",
        "export it with dataset.export(dataset_type=fiftyone.types.COCODetectionDataset, ...)",
        {"samples": [{"filepath": ...}]},
        {"labels": {...: [{"bounding_box": []}]}},
        {"sample_fields": ..., "media_type": ...},
        {"classes": [], "labels": {}},
    ),
    _format(
        "a detection result of Ultralytics or Roboflow",
        "give the ground truth instead",
        [{"box": {"x1": ...}, "confidence": ...}],
        {"predictions": [{"class": ..., "confidence": ...}]},
    ),
    _format("an Ultralytics NDJSON dataset", _YOLO, {"type": "dataset", "class_names": ...}),
    _format("a Hugging Face metadata file", _CONVERT, {"file_name": ..., "objects": {}}),
    _format("a dataset in the ODVG format", _CONVERT, {"filename": ..., "detection": {}}),
    _format("an annotation file in the ODGT format (CrowdHuman)", _CONVERT, {"ID": ..., "gtboxes": []}),
    # Labeling tools
    _format(
        "a LabelMe file of one image",
        "convert its folder with labelme2coco, or with labelme2coco.py of LabelMe's repository",
        {"shapes": [], "imagePath": ...},
        {"shapes": [], "imageData": ...},
        {"shapes": [{"label": ..., "points": []}]},
    ),
    _format("a VIA project", _VIA, {"_via_img_metadata": ...}, {"_via_settings": ...}, {"_via_attributes": ...}),
    _format("a VIA 3 project", _CONVERT, {"project": {}, "metadata": {}, "view": {}}),
    _format(
        "a VIA annotation json",
        _VIA,
        {...: {"filename": ..., "regions": []}},
        {...: {"filename": ..., "regions": {}}},
        [{"filename": ..., "regions": []}],
        [{"filename": ..., "regions": {}}],
    ),
    _format(
        "a Label Studio export",
        "export the project from Label Studio as COCO",
        [{"annotations": [{"result": []}]}],
        [{"completions": [{"result": []}]}],
        [{"predictions": [{"result": []}]}],
        [{"data": {}, "annotations": []}],
        {"data": {}, "annotations": [{"result": []}]},
        {"task": {"data": {}}, "result": []},
        [{"annotation_id": ..., "lead_time": ...}],
        [{...: [{"original_width": ..., "original_height": ...}]}],
    ),
    _format(
        "a Datumaro dataset json",
        _DATUMARO.format("datumaro"),
        {"items": [], "categories": {}},
        {"dm_format_version": ..., "items": []},
        {"items": [{"media": {}, "annotations": []}]},
        {"items": [{"image": {}, "annotations": []}]},
    ),
    _format(
        "a Darwin file of one image (V7)",
        "export COCO from V7, or run darwin convert coco (of the darwin-py package)",
        {"item": {}, "annotations": []},
        {"image": {"workview_url": ...}},
        {"image": {"filename": ...}, "annotations": [{"name": ...}]},
        {"dataset": str, "image": {"filename": ...}, "annotations": []},
    ),
    _format(
        "a Supervisely file",
        "export the project from Supervisely with its app Export to COCO",
        {"size": {"height": ..., "width": ...}, "objects": []},
        {"objects": [{"classTitle": ...}]},
        {"annotation": {"objects": [], "size": {}}},
        {"classes": [{"title": ..., "shape": ...}]},
        {"classes": [], "tags": [], "projectType": ...},
    ),
    _format(
        "a Scalabel or BDD100K label file",
        "run python -m scalabel.label.to_coco, or python -m bdd100k.label.to_coco for BDD100K",
        [{"labels": [{"category": ...}]}],
        [{"labels": [{"box2d": {}}]}],
        [{"name": ..., "labels": ..., "url": ...}],
        {"frames": [{"labels": []}]},
        {"frames": [{"objects": [{"category": ...}]}]},
        [{"name": ..., "frames": [{"objects": []}]}],
        {"name": str, "labels": [{"category": ...}]},
        [{"name": str, "attributes": {}, "timestamp": ...}],
    ),
    _format(
        "a CreateML json",
        _SUPERVISION.format("from_createml"),
        [{"annotations": [{"coordinates": {}}]}],
        [{"annotation": [{"coordinates": {}}]}],
        [{"image": str, "annotations": []}],
        [{"imagefilename": str, "annotation": []}],
        {"image": str, "annotations": [{"coordinates": {}}]},
    ),
    _format(
        "a VoTT file",
        "export Pascal VOC from VoTT and give the folder of the xml files",
        {"asset": {}, "regions": []},
        {"assets": {...: {"regions": []}}},
        {"assets": {}, "tags": []},
        {"frames": {...: [{"x1": ..., "y1": ...}]}},
        {"sourceConnection": ..., "targetConnection": ...},
        {"frames": {}, "inputTags": ...},
    ),
    _format(
        "a Segments.ai release",
        "run segments.utils.export_dataset(dataset, export_format='coco-instance') of the segments-ai package",
        {"dataset": {"samples": []}},
        {"dataset": {"task_type": ...}},
    ),
    _format(
        "an Encord export",
        "export the project from Encord as COCO",
        [{"label_hash": ..., "data_units": {}}],
        {"label_hash": ..., "data_units": {}},
        [{"data_hash": ..., "data_units": {}}],
    ),
    _format(
        "a Labelbox export",
        _CONVERT,
        {"data_row": {}},
        [{"data_row": {}}],
        [{"Labeled Data": ..., "Label": ...}],
        {"Labeled Data": ..., "Label": ...},
        {"dataRow": {}},
        [{"dataRow": {}}],
    ),
    _format(
        "a Hasty export",
        "export the project from Hasty as COCO",
        {"images": [{"image_name": ..., "labels": []}]},
        {"label_classes": []},
    ),
    _format("an annotation file of a CVAT backup", _CVAT, [{"shapes": [], "tracks": []}]),
    _format(
        "a SuperAnnotate file",
        _CONVERT,
        {"metadata": {}, "instances": []},
        {...: [{"className": ..., "type": ...}]},
        {...: {"instances": [{"className": ...}]}},
    ),
    _format("a Dataloop file of one image", _CONVERT, {"annotations": [{"datasetId": ...}]}, {"itemMetadata": ...}),
    _format("a Kili export", _CONVERT, [{"externalId": ...}], {"externalId": ..., "labels": []}),
    _format("a Scale AI export", _CONVERT, [{"task_id": ..., "response": ...}], {"task_id": ..., "response": ...}),
    _format("an OpenLABEL file", _CONVERT, {"openlabel": {}}, {"vcd": {}}),
    _format("a SageMaker Ground Truth manifest", _CONVERT, {"source-ref": ...}, [{"source-ref": ...}]),
    _format("a Vertex AI import file", _CONVERT, {"imageGcsUri": ...}),
    _format("a Prodigy export", _CONVERT, {"image": ..., "spans": []}, [{"image": ..., "spans": []}]),
    _format("a LabelU export", "export it from LabelU as COCO", [{"fileName": ..., "result": ...}]),
    # Datasets
    _format("a Cityscapes polygon file", _CONVERT, {"imgHeight": ..., "objects": []}),
    _format("a Mapillary Vistas file", _CONVERT, {"objects": [{"polygon": ...}]}),
    _format("a Visual Genome file", _CONVERT, [{"image_id": ..., "objects": []}], [{"image_id": ..., "regions": []}]),
    _format("an ADE20K file", _CONVERT, {"annotation": {"object": []}}),
    _format("a GeoJSON file", _CONVERT, {"type": "FeatureCollection"}, {"type": "Feature"}),
    # Parts, and files that contain COCO json
    _format(
        "a report of tools/check_dataset.py", "give the json that was checked", {"images_usable": ..., "issues": []}
    ),
    _format(
        "an object that contains COCO json",
        "write the inner object to a file of its own and give that",
        {...: {"images": [], "annotations": []}},
        [{"images": [], "annotations": []}],
    ),
    _format("only the images of a COCO json", _COMPLETE, [{"id": ..., "file_name": ...}]),
    _format("a list of categories", _COMPLETE, [{"id": ..., "name": str}]),
    _format(
        "a list of class names (as VoTT and Datumaro write)",
        "give the annotations, as COCO instances json",
        {"labels": [str]},
        {"label_map": ...},
        {"classes": [str]},
        [str],
    ),
)

# Each pattern is a regular expression of the first bytes.
_BINARY = (
    _format(
        "a PyTorch checkpoint",
        "give the annotations",
        rb"PK\x03\x04.{26}[^/]{1,80}/(data\.pkl|\.format_version|byteorder)",
    ),
    _format("a NumPy archive", _CONVERT, rb"PK\x03\x04.{26}[^/]{1,80}\.npy", rb"\x93NUMPY"),
    _format(
        "an Office document",
        _CONVERT,
        rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/)",
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    ),
    _format("a zip archive", _UNPACK, rb"PK\x03\x04", rb"PK\x05\x06"),
    _format("a gzip archive", _UNPACK, rb"\x1f\x8b"),
    _format("a bzip2 archive", _UNPACK, rb"BZh[1-9]"),
    _format("an xz archive", _UNPACK, rb"\xfd7zXZ\x00"),
    _format("a Zstandard archive", _UNPACK, rb"\x28\xb5\x2f\xfd"),
    _format("a 7z archive", _UNPACK, rb"7z\xbc\xaf\x27\x1c"),
    _format("a RAR archive", _UNPACK, rb"Rar!\x1a\x07"),
    _format("a tar archive", _UNPACK, rb".{257}ustar"),
    _format(
        "an image",
        "give the json of the annotations; label images (masks) must be converted to COCO instances json first",
        rb"\x89PNG\r\n",
        rb"\xff\xd8\xff",
        rb"GIF8[79]a",
        rb"BM.{4}\x00{4}",
        rb"II\*\x00",
        rb"MM\x00\*",
        rb"II\+\x00",
        rb"RIFF.{4}WEBP",
        rb".{4}ftyp(avif|heic|heix|mif1)",
        rb"\x00\x00\x00\x0cjP  ",
        rb"P[1-6]\s",
    ),
    _format("a video", _CONVERT, rb".{4}ftyp", rb"RIFF.{4}AVI ", rb"\x1a\x45\xdf\xa3"),
    _format("a Parquet file", _CONVERT, rb"PAR1"),
    _format("an Arrow or Feather file", _CONVERT, rb"ARROW1", rb"FEA1"),
    _format("an HDF5 file", _CONVERT, rb"\x89HDF\r\n"),
    _format("a MATLAB file", _CONVERT, rb"MATLAB [57]"),
    _format("a SQLite database", _CONVERT, rb"SQLite format 3\x00"),
    _format("a PDF document", _CONVERT, rb"%PDF-"),
    _format("a Python pickle", "load it where it was written and save COCO instances json", rb"\x80[\x02-\x05]"),
    _format("a TFRecord file", _CONVERT, rb"(?!\x00{4}).{4}\x00{4}.{4}\x0a"),
    _format("a file of zero bytes, as an interrupted download leaves it", "download or copy it again", rb"\x00{64}"),
)

# Each pattern is a regular expression of the first characters; ^ is the start of any line, \A that of the text.
_TEXT = (
    _format(
        "a Git LFS pointer", "run git lfs pull in its repository", r"\Aversion https://(?:git-lfs|hawser)\.github\.com/"
    ),
    _format("a DVC pointer", "run dvc pull in its repository", r"\A(?:outs|md5):[\s\S]*^[ -]*md5: [0-9a-f]{32}"),
    _format(
        "an HTML page, such as a login or error page",
        "download the file again, while logged in",
        r"(?i)\A(?:<\?xml[^>]*>\s*)?(?:<!--[\s\S]*?-->\s*)*<(?:!doctype html|html|head|body)\b",
    ),
    _format("an error message in place of a download", "download the file again", r"<Error>\s*<Code>"),
    _format(
        "a LabelMe xml of one image",
        _DATUMARO.format("label_me"),
        r"<annotation\b[\s\S]*<polygon>\s*(?:<username>[^<]*</username>\s*)?<pt>",
    ),
    _format("a Pascal VOC xml of one image", _VOC, r"<annotation(?:\s[^>]*)?>"),
    _format("a CVAT xml of a video", _CVAT, r"<annotations(?:\s[^>]*)?>[\s\S]*<track\b"),
    _format("a CVAT xml", _CVAT, r"<annotations(?:\s[^>]*)?>"),
    _format("a dlib xml", _CONVERT, r"<dataset>[\s\S]*<image\s+file="),
    _format("an xml file", _CONVERT, r"\A<\?xml", r"\A<[A-Za-z][\w:.-]*(?:\s[^<>]*)?>"),
    _format(
        "a YOLO data.yaml",
        "give it with the suffix .yaml",
        r"^names\s*:[\s\S]*^(?:train|val|path|nc)\s*:",
        r"^(?:train|val|path|nc)\s*:[\s\S]*^names\s*:",
    ),
    _format("a Darknet data file", _YOLO, r"^(?:train|valid|names)\s*=[\s\S]*^(?:names|train)\s*="),
    _format("a Darknet network config", _YOLO, r"^\[(?:net|network|yolo)\]"),
    _format("a YOLO label file of one image", _YOLO, rf"\A(?:\d+(?:\.0*)?{_VALUE}{{4,}}[ \t]*(?:\r?\n|\Z)\s*)+\Z"),
    _format(
        "a DOTA label file of one image",
        _CONVERT,
        r"\A\s*imagesource\s*:",
        rf"\A[\d.]+{_VALUE}{{7}}[ \t]+[A-Za-z][\w-]*[ \t]+[012]\s",
    ),
    _format("a KITTI label file of one image", _CONVERT, rf"\A[A-Za-z]\w*{_VALUE}{{14,15}}\s"),
    _format(
        "a VIA csv",
        _VIA,
        r"\A#?\s*filename,file_size,",
    ),
    _format("a VIA 3 csv", _CONVERT, r"\A#[\s\S]*\bCSV_HEADER\b"),
    _format("an Open Images csv", _CONVERT, r"\A\W?(?:ImageID|XMin|LabelName|MaskPath),", r"\A[^,\n]*,?/m/\w+,"),
    _format("a VoTT csv", "export Pascal VOC from VoTT and give the folder of the xml files", r'\A"?image"?,"?xmin"?,'),
    _format("a csv of boxes", _CONVERT, r"(?i)\A(?=[^\n]*\bx_?min\b)(?=[^\n]*\by_?max\b)[^\n]*,"),
    _format("a WIDER FACE annotation file", _CONVERT, r"\A[^\n]+\.jpe?g\s*\n\d+\s*\n"),
    _format(
        "a csv of run-length encoded masks (Kaggle)",
        _CONVERT,
        r"(?i)\A[^\n]*\bencoded_?pixels\b",
        r"(?i)\A[^\n]*,\s*rle\b",
    ),
    _format("a MOT ground truth file", _CONVERT, r"\A(?:\d+,-?\d+(?:,-?[\d.]+){4,8}\s*(?:\n|\Z))+"),
    _format("a list of image files", _YOLO, r"(?i)\A(?:[^\n]+\.(?:jpe?g|png|bmp|tiff?|webp)[ \t]*(?:\r?\n|\Z)\s*)+\Z"),
    _format(
        "a csv file",
        _CONVERT,
        r"\A[^\n,;\t]*([,;\t])[^\n]*\1[^\n]*\n[^\n]*\1[^\n]*\1",
        r"\A[^\n,]+(?:,[^\n,]+){3,}\s*\Z",
    ),
    _format("a Python source file", _CONVERT, r"\A(?:#![^\n]*python|import \w+|from \w[\w.]* import )"),
    _format("a list of words, such as class names", _COMPLETE, r"\A(?:[A-Za-z_][\w -]{0,60}[ \t\r]*(?:\n|\Z))+\Z"),
    _format("a YAML file", _CONVERT, r"\A---\s", r"\A(?:#[^\n]*\n|\s)*[A-Za-z_][\w.-]*:(?:\s|\Z)"),
)
_LINES = _format("a JSON Lines file, with one JSON object in each line", _CONVERT)


def recognize(path: Path) -> str | None:
    """Do as :func:`recognize_json` for a file, which is read completely if it is JSON."""
    if found := recognize_file(path):
        return found
    try:
        text = path.read_text(encoding="utf-8-sig")
        try:
            return recognize_json(json.loads(text))
        except json.JSONDecodeError as error:
            return recognize_json_lines(text, error.pos) if error.msg == "Extra data" else None
    except (OSError, ValueError, RecursionError):
        return None


def recognize_json(data: Any) -> str | None:
    """Return what parsed JSON is and what to do, such as "is a LabelMe file ..., not COCO instances json. Fix: ...".

    Returns:
        None for COCO instances, also incomplete ones, and for an unknown format.
    """
    if _is_coco_instances(data):
        return None
    found = _find(_JSON, lambda pattern: _matches(pattern, data))
    return str(found) if found else None


def recognize_json_lines(text: str, end: int) -> str | None:
    """Do as :func:`recognize_json` for several JSON values in sequence.

    Args:
        text: content of the file.
        end: index of the end of its first value.
    """
    try:
        first = json.loads(text[:end])
    except (ValueError, RecursionError):
        return None
    if not isinstance(first, (dict, list)) or text[end:].lstrip()[:1] not in ("{", "[") or _is_coco_instances(first):
        return None
    return recognize_json(first) or str(_LINES)


def recognize_file(path: Path) -> str | None:
    """Do as :func:`recognize_json` for a file that is not JSON, of which only the first bytes are read.

    Returns:
        None for JSON, for a file that cannot be read, and for an unknown format.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(encoding, errors="replace").lstrip()
    if text[:1] in ("{", "["):
        return None
    if len(head) == _HEAD:  # the last line may be cut
        text = text.rpartition("\n")[0] or text
    found = _find(_BINARY, lambda pattern: re.match(pattern, head, re.DOTALL)) or _find(
        _TEXT, lambda pattern: re.search(pattern, text, re.MULTILINE)
    )
    return str(found) if found else None


def _find(formats: tuple[_Format, ...], matches: Callable[[Any], Any]) -> _Format | None:
    return next((entry for entry in formats if any(matches(pattern) for pattern in entry.patterns)), None)


def _is_coco_instances(data: Any) -> bool:
    """Return whether ``data`` has images and categories, and a box or mask if it has annotations."""
    lists = [data.get(key) for key in ("images", "categories")] if isinstance(data, dict) else [None]
    if not all(value and isinstance(value, list) for value in lists):
        return False
    return not data.get("annotations") or _has_instances(data["annotations"])


def _has_instances(entries: Any) -> bool:
    """Return whether an annotation has a box or mask; True for what is not a list, which the validation reports."""
    return not isinstance(entries, list) or any(
        isinstance(entry, dict) and ("bbox" in entry or "segmentation" in entry) for entry in entries
    )


def _matches(pattern: Any, data: Any) -> bool:
    """Return whether parsed JSON matches a pattern of the table above."""
    if pattern is ...:
        return True
    if isinstance(pattern, dict):
        return isinstance(data, dict) and all(_has(data, key, value) for key, value in pattern.items())
    if isinstance(pattern, list):
        return isinstance(data, list) and (not pattern or any(_matches(pattern[0], item) for item in data[:_ITEMS]))
    if isinstance(pattern, type):
        return isinstance(data, pattern)
    return pattern(data) if callable(pattern) else bool(data == pattern)


def _has(data: dict[str, Any], key: Any, pattern: Any) -> bool:
    if key is ...:
        return any(_matches(pattern, value) for value in islice(data.values(), _ITEMS))
    return key in data and _matches(pattern, data[key])
