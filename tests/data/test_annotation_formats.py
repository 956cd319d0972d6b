"""Recognition of files that are not COCO instances json: each format by its structure, and no input fails."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import struct
import tarfile
import zipfile

from halodet.data import validate_coco
from halodet.data.annotation_formats import recognize, recognize_json
from halodet.errors import DatasetError

import numpy as np
import pytest
from PIL import Image

BOX = {"x": 1, "y": 2, "width": 3, "height": 4}
POINTS = [[1, 1], [9, 1], [9, 9]]
COCO_IMAGE = {"id": 1, "file_name": "a.jpg", "width": 10, "height": 8}
COCO_LISTS = {"images": [COCO_IMAGE], "categories": [{"id": 1, "name": "cat"}]}
LS_RESULT = {"type": "rectanglelabels", "original_width": 10, "value": {**BOX, "rectanglelabels": ["cat"]}}
VIA_IMAGE = {"filename": "a.jpg", "size": 9, "regions": [{"shape_attributes": {"name": "rect", **BOX}}]}
LABELME = {"version": "5.4.1", "flags": {}, "shapes": [{"label": "cat", "points": POINTS, "shape_type": "polygon"}]}
DARWIN_BOX = {"name": "cat", "bounding_box": {"x": 0, "y": 0, "w": 1, "h": 1}}

JSON = [
    ("LabelMe", {**LABELME, "imagePath": "a.jpg", "imageData": None, "imageHeight": 8, "imageWidth": 10}),
    ("LabelMe", {**LABELME, "imagePath": "a.jpg", "imageData": "aGVsbG8="}),
    ("LabelMe", {**LABELME, "shapes": [], "imagePath": "a.jpg"}),
    ("VIA project", {"_via_settings": {}, "_via_img_metadata": {"a.jpg9": VIA_IMAGE}, "_via_attributes": {}}),
    ("VIA annotation", {"a.jpg9": VIA_IMAGE}),
    ("VIA annotation", {"a.jpg": {"filename": "a.jpg", "fileref": "", "regions": {"0": {"shape_attributes": {}}}}}),
    ("VIA annotation", [VIA_IMAGE]),
    ("VIA 3", {"project": {"pid": "x"}, "config": {}, "attribute": {}, "file": {}, "metadata": {}, "view": {}}),
    ("Label Studio", [{"id": 1, "data": {"image": "/a.jpg"}, "annotations": [{"id": 2, "result": [LS_RESULT]}]}]),
    ("Label Studio", [{"id": 1, "data": {"image": "/a.jpg"}, "annotations": []}]),
    ("Label Studio", [{"id": 1, "data": {"image": "/a.jpg"}, "completions": [{"result": [LS_RESULT]}]}]),
    ("Label Studio", [{"image": "/a.jpg", "id": 1, "label": [{**BOX, "original_width": 9, "original_height": 9}]}]),
    ("Label Studio", [{"image": "/a.jpg", "id": 1, "annotator": 1, "annotation_id": 5, "lead_time": 3.1}]),
    ("Datumaro", {"infos": {}, "categories": {"label": {"labels": []}}, "items": []}),
    ("Datumaro", {"dm_format_version": "1.0", "media_type": 2, "categories": {}, "items": [{"id": "a"}]}),
    ("Darwin", {"version": "2.0", "item": {"name": "a.jpg", "slots": []}, "annotations": [DARWIN_BOX]}),
    ("Darwin", {"dataset": "d", "image": {"filename": "a.jpg", "workview_url": ""}, "annotations": [DARWIN_BOX]}),
    ("Darwin", {"image": {"filename": "a.jpg", "width": 9}, "annotations": [DARWIN_BOX]}),
    ("Supervisely", {"description": "", "tags": [], "size": {"height": 8, "width": 10}, "objects": []}),
    ("Supervisely", {"classes": [{"title": "cat", "shape": "polygon", "color": "#FF0000"}], "tags": []}),
    ("Supervisely", {"imageId": 1, "annotation": {"size": {"height": 8, "width": 10}, "objects": []}}),
    ("Segment Anything", {"image": {"image_id": 1}, "annotations": [{"id": 1, "predicted_iou": 0.9}]}),
    ("Segment Anything", [{"segmentation": {"size": [8, 10], "counts": ""}, "bbox": [0] * 4, "predicted_iou": 0.9}]),
    ("Scalabel or BDD100K", [{"name": "a.jpg", "labels": [{"id": "1", "category": "car", "box2d": {"x1": 1}}]}]),
    ("Scalabel or BDD100K", [{"name": "a.jpg", "labels": None}, {"name": "b", "labels": [{"category": "car"}]}]),
    ("Scalabel or BDD100K", {"frames": [{"name": "a.jpg", "labels": [{"category": "car"}]}], "config": {}}),
    ("Scalabel or BDD100K", {"name": "a", "frames": [{"timestamp": 1, "objects": [{"category": "car"}]}]}),
    ("CreateML", [{"image": "a.jpg", "annotations": [{"label": "x", "coordinates": BOX}]}]),
    ("CreateML", [{"imagefilename": "a.jpg", "annotation": [{"label": "x", "coordinates": BOX}]}]),
    ("CreateML", [{"image": "a.jpg", "annotations": []}]),
    ("VoTT", {"asset": {"format": "jpg"}, "regions": [{"type": "RECTANGLE", "tags": ["x"]}], "version": "2.2.0"}),
    ("VoTT", {"name": "p", "assets": {"1": {"asset": {}, "regions": []}}, "tags": [{"name": "x"}]}),
    ("VoTT", {"frames": {"a.jpg": [{"x1": 1, "y1": 1, "x2": 2, "y2": 2, "tags": ["x"]}]}, "inputTags": "x"}),
    ("Segments.ai", {"name": "v1", "dataset": {"name": "d", "task_type": "segmentation-bitmap", "samples": []}}),
    ("COCO results", [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]),
    ("COCO results", [{"image_id": 1, "category_id": 1, "segmentation": {}, "score": 0.5}]),
    ("COCO results", [{"image_id": 1, "category_id": 1, "keypoints": [1, 1, 1], "score": 0.5}]),
    ("COCO results", [{"image_id": 1, "caption": "a cat"}]),
    ("COCO captions", {"images": [COCO_IMAGE], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}),
    ("COCO captions", {**COCO_LISTS, "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}),
    ("COCO keypoints", {**COCO_LISTS, "annotations": [{"id": 1, "image_id": 1, "keypoints": [1, 1, 2]}]}),
    ("COCO panoptic", {**COCO_LISTS, "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": []}]}),
    ("COCO panoptic", [{"image_id": 1, "file_name": "a.png", "segments_info": []}]),
    ("only the annotations", [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]),
    ("only the images", [COCO_IMAGE]),
    ("list of categories", [{"id": 1, "name": "cat", "supercategory": "animal"}]),
    ("class names", ["cat", "dog"]),
    ("class names", {"labels": ["cat", "dog"]}),
    ("contains COCO json", {"train": {**COCO_LISTS, "annotations": []}}),
    ("YouTube-VIS", {"videos": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}),
    ("Detectron2", [{"file_name": "a.jpg", "height": 8, "width": 10, "annotations": [{"bbox_mode": 0}]}]),
    ("Detectron2", [{"file_name": "a.jpg", "image_id": 1, "height": 8, "width": 10, "annotations": []}]),
    ("MMDetection", [{"filename": "a.jpg", "width": 10, "height": 8, "ann": {"bboxes": []}}]),
    ("MMDetection", {"metainfo": {"classes": ["cat"]}, "data_list": [{"img_path": "a.jpg", "instances": []}]}),
    ("FiftyOne", {"samples": [{"_id": {"$oid": "6"}, "filepath": "data/a.jpg"}]}),
    ("FiftyOne", {"classes": ["cat"], "labels": {"a": [{"label": 0, "bounding_box": [0, 0, 1, 1]}]}}),
    ("Ultralytics or Roboflow", [{"name": "cat", "class": 0, "confidence": 0.9, "box": {"x1": 1}}]),
    ("Ultralytics or Roboflow", {"predictions": [{**BOX, "class": "cat", "confidence": 0.9}], "image": {}}),
    ("Encord", [{"label_hash": "x", "data_units": {}, "object_answers": {}}]),
    ("Labelbox", [{"ID": "x", "Labeled Data": "https://x/a.jpg", "Label": {"objects": []}}]),
    ("Labelbox", {"data_row": {"id": "x"}, "media_attributes": {}, "projects": {}}),
    ("Hasty", {"project_name": "p", "export_format_version": "1.1", "images": [{"image_name": "a", "labels": []}]}),
    ("CVAT backup", [{"version": 0, "tags": [], "shapes": [{"type": "rectangle"}], "tracks": []}]),
    ("SuperAnnotate", {"metadata": {"name": "a.jpg"}, "instances": [{"type": "bbox", "className": "cat"}]}),
    ("Cityscapes", {"imgHeight": 8, "imgWidth": 10, "objects": [{"label": "car", "polygon": POINTS}]}),
    ("ADE20K", {"annotation": {"filename": "a.jpg", "object": [{"id": 0, "polygon": {}}]}}),
    ("GeoJSON", {"type": "FeatureCollection", "features": []}),
    ("OpenLABEL", {"openlabel": {"metadata": {}}}),
    ("check_dataset", {"images_usable": 3, "issues": []}),
]

VOC = """<annotation><folder>x</folder><filename>a.jpg</filename><size><width>10</width><height>8</height></size>
<object><name>cat</name><bndbox><xmin>1</xmin></bndbox></object></annotation>"""
TEXT = [
    ("Pascal VOC", VOC),
    ("Pascal VOC", '<?xml version="1.0"?>\n<!-- made by hand -->\n<annotation verified="yes">\n</annotation>'),
    ("LabelMe xml", "<annotation><object><polygon><username>me</username><pt><x>1</x><y>1</y></pt></polygon></object>"),
    ("CVAT xml", "<annotations><version>1.1</version><meta></meta><image id='0' name='a.jpg'></image></annotations>"),
    ("CVAT xml of a video", "<annotations><meta></meta><track id='0' label='cat'></track></annotations>"),
    ("an xml file", "<?xml version='1.0'?><root/>"),
    ("HTML page", "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"),
    ("HTML page", "\n<html lang='en'>"),
    ("error message", "<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
    ("Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12\n"),
    ("YOLO label file", "0 0.5 0.5 0.2 0.3\n1 0.25 0.3 0.1 0.1\n"),
    ("YOLO label file", "0 0.5 0.5 0.2 0.3"),
    ("YOLO label file", "3 0.1 0.1 0.5 0.1 0.5 0.6\n\n"),
    ("YOLO label file", "3 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6\r\n1 1e-1 0.1 0.5 0.1 0.5 0.6 0.1 0.6\r\n"),
    ("YOLO data.yaml", "train: ../train/images\nval: ../valid/images\n\nnc: 2\nnames: ['a', 'b']\n"),
    ("YOLO data.yaml", "# COCO8\nnames:\n  0: person\npath: coco8\n"),
    ("a YAML file", "MODEL:\n  WEIGHTS: x\n"),
    ("VIA csv", 'filename,file_size,file_attributes,region_count\na.jpg,9,"{}",1\n'),
    ("VIA csv", '#filename,file_size,file_attributes,region_count\na.jpg,9,"{}",1\n'),
    ("VIA 3 csv", '# Exported\n# CSV_HEADER = metadata_id,file_list\n"1","[""a.jpg""]"\n'),
    ("Open Images csv", "ImageID,Source,LabelName,Confidence,XMin,XMax\na,xclick,/m/01g317,1,0.1,0.2\n"),
    ("Kaggle", "ImageId,EncodedPixels\na.jpg,1 3 10 5\n"),
    ("VoTT csv", '"image","xmin","ymin","xmax","ymax","label"\n"a.jpg",1,2,3,4,"cat"\n'),
    ("csv of boxes", "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,10,8,cat,1,2,3,4\n"),
    ("a csv file", "path;x1;y1\na.jpg;1;2\n"),
    ("WIDER FACE", "0--Parade/0_1.jpg\n1\n449 330 122 149 0 0 0 0 0 0\n"),
    ("class names", "cat\nfire hydrant\n"),
    ("MOT", "1,1,912,484,97,109,0,7,1\n2,1,912,484,97,109,0,7,1\n"),
    ("KITTI", "Car 0.00 0 -1.57 599.41 156.40 629.75 189.25 2.85 2.63 12.34 0.47 1.49 69.44 -1.56\n"),
    ("DOTA", "2753 2408 2861 2385 2888 2468 2805 2502 plane 0\n"),
    ("DOTA", "imagesource:GoogleEarth\ngsd:0.1\n"),
    ("list of image files", "images/a.jpg\n./images/b.PNG\n"),
]


def packed(kind):
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("a/instances.json", "{}")
    elif kind == "npz":
        np.savez(out, a=np.zeros(3))
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.json"))
    elif kind == "npy":
        np.save(out, np.zeros(3))
    else:
        Image.new("RGB", (9, 7)).save(out, kind)
    return out.getvalue()


BINARY = [
    ("zip archive", packed("zip")),
    ("tar archive", packed("tar")),
    ("gzip archive", gzip.compress(b"{}", mtime=0)),
    ("bzip2 archive", bz2.compress(b"{}")),
    ("xz archive", lzma.compress(b"{}")),
    ("7z archive", b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(20)),
    ("RAR archive", b"Rar!\x1a\x07\x01\x00"),
    ("NumPy", packed("npz")),
    ("NumPy", packed("npy")),
    *(("an image", packed(kind)) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")),
    ("Parquet", b"PAR1" + bytes(20)),
    ("Python pickle", pickle.dumps({"a": 1})),
    ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(20)),
    ("TFRecord", struct.pack("<QI", 40, 77) + b"\x0a\x26" + bytes(42)),
    ("zero bytes", bytes(500)),
]


@pytest.mark.parametrize(("name", "data"), JSON)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_of_another_format_is_named(tmp_path, name, data, indent):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(data, indent=indent))
    assert_named(file, name)


@pytest.mark.parametrize(("name", "text"), TEXT)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_file_of_another_format_is_named(tmp_path, name, text, encoding):
    file = tmp_path / "a.json"
    file.write_bytes(text.encode(encoding))
    assert_named(file, name)


@pytest.mark.parametrize(("name", "content"), BINARY)
def test_a_binary_file_is_named(tmp_path, name, content):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert_named(file, name)


def assert_named(file, name):
    with pytest.raises(DatasetError) as raised:
        validate_coco(file, file.parent)
    message = str(raised.value)
    assert message.startswith(f"{file} is ") and ", not COCO instances json. Fix: " in message
    assert name in message.split(", not COCO")[0] and "\n" not in message
    assert recognize(file) == message.removeprefix(f"{file} ")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("JSON Lines", {"image": "a.jpg", "annotations": []}),
        ("Labelbox", {"data_row": {"id": "x"}, "projects": {}}),
        ("SageMaker", {"source-ref": "s3://x/a.jpg"}),
        ("Hugging Face", {"file_name": "a.jpg", "objects": {"bbox": []}}),
        ("Ultralytics NDJSON", {"type": "dataset", "task": "detect", "class_names": {"0": "cat"}}),
    ],
)
def test_json_lines_are_named(tmp_path, name, row):
    file = tmp_path / "a.json"
    file.write_text("\n".join([json.dumps(row)] * 3))
    assert_named(file, name)


@pytest.mark.parametrize(
    "data",
    [
        {**COCO_LISTS, "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]},
        {**COCO_LISTS, "annotations": [{"id": 1, "segmentation": [], "keypoints": [1, 1, 2], "caption": "x"}]},
        {**COCO_LISTS, "annotations": []},
        COCO_LISTS,
        {"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]},
        {"images": [COCO_IMAGE], "annotations": []},
        {"images": [], "annotations": [{"bbox": [0, 0, 1, 1], "keypoints": [1, 1, 2]}]},
        {},
        [],
        "text",
        None,
        3,
        {"weights": [1, 2]},
    ],
)
def test_coco_and_unknown_json_is_not_recognized(data):
    assert recognize_json(data) is None


def test_no_input_fails(tmp_path):
    generator = random.Random(0)
    starts = [content for _, content in BINARY] + [text.encode() for _, text in TEXT] + [b"", b"{", b"[", b"\xff\xfe"]
    file = tmp_path / "a.json"
    for number in range(600):
        start = generator.choice(starts)
        content = bytearray(
            start[: generator.randrange(len(start) + 1)] + generator.randbytes(generator.randrange(300))
        )
        for _ in range(generator.randrange(4)):
            if content:
                content[generator.randrange(len(content))] = generator.randrange(256)
        file.write_bytes(content)
        found = recognize(file)
        assert found is None or found.startswith("is "), number
        with pytest.raises(DatasetError):
            validate_coco(file, tmp_path)


def test_only_the_start_of_a_file_that_is_not_json_is_read(tmp_path):
    file = tmp_path / "huge.zip"
    with open(file, "wb") as out:
        out.write(b"PK\x03\x04")
        out.truncate(1 << 40)
    assert "zip archive" in recognize(file)


@pytest.mark.parametrize(
    "line", ["0 0.5 0.5 0.2 0.3\n", "a.jpg,1,2,3\n", "images/a.jpg\n", "x: 1\n", "1,1,9,4,7,9,0\n", "cat dog\n", "<a>"]
)
def test_recognition_of_a_long_file_is_fast(tmp_path, line):
    file = tmp_path / "a.txt"
    file.write_text(line * (200_000 // len(line)) + "?")
    recognize(file)  # takes milliseconds; quadratic expressions would take minutes


def test_a_missing_file_is_not_recognized(tmp_path):
    assert recognize(tmp_path / "none.json") is None and recognize(tmp_path) is None
