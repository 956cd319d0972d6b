"""Reading of YOLO and Pascal VOC datasets: values against independent arithmetic, layouts, and errors."""

import json
import logging

from halodet.config import load_config
from halodet.data import validate_coco
from halodet.data.annotations import mask_box
from halodet.data.user_datasets import register_user_data, register_user_data_again
from halodet.data.yolo_voc import read_yolo_or_voc
from halodet.errors import ConfigError, DatasetError

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances
from detectron2.structures import BoxMode
from helpers import load_tool
from PIL import Image

SIZE = (61, 43)  # odd, so that half pixels occur
NAMES = ["zebra", "ant", "cow"]  # not in alphabetical order
BOX_LINE = "0 0.5 0.5 0.2 0.3"
ORIENTATION = 0x0112


def save_image(path, size=SIZE, orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    Image.new("RGB", size).save(path, exif=exif)


@pytest.fixture
def dataset(tmp_path):
    """Return a function that writes a YOLO dataset of {image: label text or None} and returns its yaml."""

    def write(images, split="train", size=SIZE, **config):
        for name, label in images.items():
            save_image(tmp_path / "images" / split / name, size)
            if label is not None:
                path = (tmp_path / "labels" / split / name).with_suffix(".txt")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(label)
        file = tmp_path / "data.yaml"
        splits = {"train": "images/train", "val": "images/val"}
        file.write_text(yaml.safe_dump({**splits, "nc": 3, "names": NAMES, **config}))
        return file

    return write


def read(file, images=None, **options):
    checked = validate_coco(file, images, **{"need_masks": False, **options})
    return checked, checked.dataset


def random_polygons(generator, count):
    for _ in range(count):
        corners = generator.integers(3, 12)
        angles = np.sort(generator.uniform(0, 2 * np.pi, corners))
        yield 0.5 + 0.4 * generator.uniform(0.5, 1) * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_yolo_boxes_are_those_of_independent_arithmetic(dataset):
    generator = np.random.default_rng(0)
    corners = np.sort(generator.uniform(0, 0.99, (40, 2, 2)), axis=1)  # index, minimum and maximum, x and y
    corners[:, 1] += 0.01  # no box of less than a tenth of a pixel
    classes = generator.integers(0, 3, 40)
    rows = [
        f"{c} {(a[0] + b[0]) / 2:.17g} {(a[1] + b[1]) / 2:.17g} {b[0] - a[0]:.17g} {b[1] - a[1]:.17g}"
        for c, (a, b) in zip(classes, corners, strict=True)
    ]
    checked, data = read(dataset({"a.jpg": "\n".join(rows)}))
    assert checked.issues == [] and data["categories"] == [{"id": n, "name": name} for n, name in enumerate(NAMES)]
    found = np.array([entry["bbox"] for entry in data["annotations"]])
    np.testing.assert_allclose(found[:, :2], corners[:, 0] * SIZE, atol=1e-9)
    np.testing.assert_allclose(found[:, :2] + found[:, 2:], corners[:, 1] * SIZE, atol=1e-9)
    np.testing.assert_allclose([entry["area"] for entry in data["annotations"]], found[:, 2] * found[:, 3])
    assert [entry["category_id"] for entry in data["annotations"]] == classes.tolist()
    (image,) = data["images"]
    assert (image["file_name"], image["width"], image["height"]) == ("a.jpg", *SIZE)


def test_yolo_polygons_stay_exact(dataset):
    polygons = list(random_polygons(np.random.default_rng(1), 20))
    rows = ["1 " + " ".join(f"{value:.17g}" for value in polygon.ravel()) for polygon in polygons]
    rows[3] += " 0.87"  # the confidence of a prediction
    checked, data = read(dataset({"a.jpg": "\n".join(rows)}), need_masks=True, require_annotations=True)
    assert checked.issues == [] and len(data["annotations"]) == 20
    for polygon, entry in zip(polygons, data["annotations"], strict=True):
        (mask,) = entry["segmentation"]
        pixels = polygon * SIZE
        np.testing.assert_allclose(np.reshape(mask, (-1, 2)), pixels, atol=1e-9)
        np.testing.assert_allclose(entry["bbox"], [*pixels.min(0), *np.ptp(pixels, axis=0)], atol=1e-9)
        first, second = pixels[1:-1] - pixels[0], pixels[2:] - pixels[0]
        triangles = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
        assert entry["area"] == pytest.approx(abs(triangles.sum()) / 2)
        x, y, w, h = mask_box(entry["segmentation"], *SIZE)
        np.testing.assert_allclose([x, y, x + w, y + h], [*pixels.min(0), *pixels.max(0)], atol=1.5)


def test_yolo_oriented_boxes_pose_and_confidences(dataset):
    rows = "0 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6\n1 0.5 0.5 0.2 0.2 0.1 0.1 2 0.3 0.3 1\n2 0.5 0.5 0.2 0.2 0.9\n"
    _, data = read(dataset({"a.jpg": rows}, kpt_shape=[2, 3]))
    corners, pose, confident = data["annotations"]
    assert corners["segmentation"] == [pytest.approx([6.1, 4.3, 30.5, 4.3, 30.5, 25.8, 6.1, 25.8])]
    assert corners["bbox"] == pytest.approx([6.1, 4.3, 24.4, 21.5])
    assert "segmentation" not in pose and pose["bbox"] == confident["bbox"] == pytest.approx([24.4, 17.2, 12.2, 8.6])


def test_yolo_images_without_objects_upper_case_suffixes_and_subfolders(dataset):
    images = {"a.JPG": BOX_LINE, "b.png": None, "c.jpeg": "", "sub/a.jpg": "1 0.5 0.5 0.1 0.1\r\n\n"}
    checked, data = read(dataset(images))
    assert checked.issues == []
    names = {image["id"]: image["file_name"] for image in data["images"]}
    assert sorted(names.values()) == sorted(images)
    assert [(names[entry["image_id"]], entry["category_id"]) for entry in data["annotations"]] == [
        ("a.JPG", 0),
        ("sub/a.jpg", 1),
    ]


def test_yolo_labels_are_relative_to_the_upright_image(dataset, tmp_path):
    file = dataset({"a.jpg": BOX_LINE})
    save_image(tmp_path / "images/train/a.jpg", orientation=6)
    checked, data = read(file)
    assert checked.issues == [] and (data["images"][0]["width"], data["images"][0]["height"]) == SIZE[::-1]
    assert data["annotations"][0]["bbox"] == pytest.approx([0.4 * 43, 0.35 * 61, 0.2 * 43, 0.3 * 61])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("7 0.5 0.5 0.2 0.3", "category_id=7 is not among the categories"),
        ("-1 0.5 0.5 0.2 0.3", "category_id=-1 is not among the categories"),
        ("1.5 0.5 0.5 0.2 0.3", "category_id='1.5' is invalid: expected an integer"),
        ("cat 0.5 0.5 0.2 0.3", "category_id='cat' is invalid: expected an integer"),
        ("0 0.5 0.5 0.2 x", "bbox=[0.5, 0.5, 0.2, 'x'] is invalid: expected 4 finite numbers"),
        ("0 0.5 0.5", "bbox=[0.5, 0.5] is invalid: expected 4 finite numbers"),
        ("0 nan 0.5 0.2 0.3", "is invalid: expected 4 finite numbers"),
        ("inf 0.5 0.5 0.2 0.3", "category_id='inf' is invalid: expected an integer"),
        ("0 0.5 0.5 0 0.3", "bbox="),
        ("0 30 20 10 8", "bbox="),
        ("0", "bbox=None is invalid"),
    ],
)
def test_an_invalid_yolo_line_is_skipped_and_listed_with_its_place(dataset, row, reason):
    checked, data = read(dataset({"a.jpg": f"{BOX_LINE}\n\n{row}\n"}))
    assert len(data["annotations"]) == 1
    issue = checked.issues[0]
    assert (issue.where, issue.action) == ("a.txt line 3", "skipped") and reason in issue.reason


def test_a_class_written_as_a_float_is_an_index(dataset):
    assert read(dataset({"a.jpg": "1.0 0.5 0.5 0.2 0.3"}))[1]["annotations"][0]["category_id"] == 1


@pytest.mark.parametrize(
    "names", [["zebra", "ant", "cow"], {0: "zebra", 1: "ant", 2: "cow"}, {"2": "cow", "0": "zebra", "1": "ant"}]
)
def test_names_keep_yolos_order(dataset, names):
    checked, _ = read(dataset({"a.jpg": BOX_LINE}, names=names))
    assert checked.class_names == NAMES


@pytest.mark.parametrize(
    "train",
    [
        "images/train",
        "./images/train/",
        "../images/train",  # Roboflow
        "/content/dataset/images/train",  # of another machine
        "C:\\data\\images\\train",
        ["images/train"],
        "train.txt",
        ["train.txt"],
    ],
)
@pytest.mark.parametrize("path", [None, ".", "", "../missing", "absolute"])
def test_paths_of_a_split(dataset, tmp_path, monkeypatch, train, path):
    path = str(tmp_path) if path == "absolute" else path
    file = dataset({"a.jpg": BOX_LINE, "sub/b.jpg": BOX_LINE}, train=train, **({} if path is None else {"path": path}))
    (tmp_path / "train.txt").write_text("./images/train/a.jpg\n\nimages/train/sub/b.jpg\n")
    monkeypatch.chdir(tmp_path.parent)
    checked, data = read(file.relative_to(tmp_path.parent))
    assert checked.issues == [] and len(data["annotations"]) == 2
    assert [image["file_name"] for image in data["images"]] == ["a.jpg", "sub/b.jpg"]
    assert checked.image_dir.samefile(tmp_path / "images/train")


def test_a_list_of_folders_a_relative_path_and_labels_beside_the_images(tmp_path):
    for folder in ("one", "two"):
        save_image(tmp_path / "root" / folder / "a.jpg")
        (tmp_path / "root" / folder / "a.txt").write_text(BOX_LINE)
    (tmp_path / "data.yml").write_text("path: root\ntrain: [one, two]\nnames: [zebra]\n")
    checked, data = read(tmp_path / "data.yml")
    assert [image["file_name"] for image in data["images"]] == ["one/a.jpg", "two/a.jpg"]
    assert len(data["annotations"]) == 2 and checked.image_dir.samefile(tmp_path / "root")


def test_splits_and_a_given_image_folder(dataset, tmp_path):
    dataset({"v.jpg": BOX_LINE}, split="val")
    file = dataset({"t.jpg": BOX_LINE})
    assert [image["file_name"] for image in read(file)[1]["images"]] == ["t.jpg"]
    assert [image["file_name"] for image in read(file, split="val")[1]["images"]] == ["v.jpg"]
    _, data = read(file, tmp_path / "images/val")
    assert [image["file_name"] for image in data["images"]] == ["v.jpg"]
    _, data = read(tmp_path, split="val")  # a folder with one data.yaml
    assert [image["file_name"] for image in data["images"]] == ["v.jpg"]


def test_the_images_may_be_the_working_directory(dataset, tmp_path, monkeypatch):
    dataset({"a.jpg": BOX_LINE})
    monkeypatch.chdir(tmp_path / "images/train")
    _, data = read("../../data.yaml", ".")
    assert [image["file_name"] for image in data["images"]] == ["a.jpg"] and len(data["annotations"]) == 1


def test_an_unusable_image_is_listed(dataset, tmp_path):
    file = dataset({"a.jpg": BOX_LINE, "b.jpg": BOX_LINE}, train="train.txt")
    (tmp_path / "images/train/b.jpg").write_text("nothing")
    (tmp_path / "train.txt").write_text("images/train/a.jpg\nimages/train/b.jpg\nimages/train/none.jpg\n")
    checked, data = read(file)
    assert [image["file_name"] for image in data["images"]] == ["a.jpg"]
    assert [issue.reason.split()[0] for issue in checked.issues] == ["'b.jpg'", "'none.jpg'"]
    assert "cannot be opened" in str(checked.issues[0]) and "is not in" in str(checked.issues[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("[1, 2]", "'names' is missing"),
        ("MODEL:\n  WEIGHTS: x", "'names' is missing"),
        ("names: obj.names\ntrain: images/train", "names='obj.names' is invalid"),
        ("names: {a: b}\ntrain: images/train", "names={'a': 'b'} is invalid"),
        ("names: []\ntrain: images/train", "names=[] is invalid"),
        ("names: [a]", "'train' is missing"),
        ("names: [a]\ntrain: none/here", "train='none/here' is not in"),
        ("names: [a]\ntrain: empty", "has no image"),
        ("names: [a]\ntrain: data.yaml", "expected a folder or a txt file"),
        ("names: [a]\ntrain: images/bare", "none of 1 images"),
    ],
)
def test_an_unusable_yaml_is_a_one_line_error_with_its_name(tmp_path, text, message):
    file = tmp_path / "data.yaml"
    file.write_text(text)
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "images/bare/a.jpg")
    with pytest.raises(DatasetError) as raised:
        read(file)
    assert message in str(raised.value) and str(raised.value).startswith(str(file)) and "\n" not in str(raised.value)


def voc_object(name, box, more=""):
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def voc(folder, name, *objects, filename=None, size=SIZE, image=True):
    """Write one xml file, and its image beside it."""
    if image:
        save_image(folder / name)
    element = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    text = f"<annotation><filename>{name if filename is None else filename}</filename>{element}{''.join(objects)}"
    path = (folder / name).with_suffix(".xml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "</annotation>")


def test_voc_splits_are_those_of_its_lists(tmp_path):
    folder = tmp_path / "Annotations"
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        voc(folder, name, voc_object("fig", (1, 1, 5, 5)))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc 1\n\n")
    for split, names in (("train", ["a.jpg", "c.jpg"]), ("val", ["a.jpg", "b.jpg", "c.jpg"])):
        dataset, _ = read_yolo_or_voc(folder, None, split)
        assert [image["file_name"] for image in dataset["images"]] == names
    (lists / "val.txt").write_text("none\n")
    with pytest.raises(DatasetError, match=r"val\.txt lists none"):
        read_yolo_or_voc(folder, None, "val")


def test_voc_boxes_are_pixels_counted_from_1(tmp_path):
    masks = np.zeros((3, SIZE[1], SIZE[0]), bool)
    masks[0, 4:30, 7:41] = masks[1, :, :] = masks[2, 42:, 60:] = True
    objects = []
    for name, mask in zip(("dog", "cat", "dog"), masks, strict=True):
        rows, columns = np.nonzero(mask)
        objects.append(voc_object(name, np.array([columns.min(), rows.min(), columns.max(), rows.max()]) + 1))
    voc(tmp_path, "a.jpg", *objects)
    voc(tmp_path, "empty.jpg")
    save_image(tmp_path / "without_xml.jpg")
    checked, data = read(tmp_path)
    assert checked.issues == [] and data["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert [entry["category_id"] for entry in data["annotations"]] == [2, 1, 2]
    assert [image["file_name"] for image in data["images"]] == ["a.jpg", "empty.jpg"]
    for mask, entry in zip(masks, data["annotations"], strict=True):
        x, y, w, h = map(int, entry["bbox"])
        drawn = np.zeros_like(mask)
        drawn[y : y + h, x : x + w] = True
        assert np.array_equal(drawn, mask) and entry["area"] == mask.sum() and entry["iscrowd"] == 0


def test_voc_boxes_are_those_of_detectron2(tmp_path):
    generator = np.random.default_rng(2)
    for number in range(5):
        corners = np.sort(generator.integers(1, SIZE, (4, 2, 2)), axis=1) + [[0], [1]]
        objects = [voc_object(NAMES[generator.integers(3)], box.ravel()) for box in corners]
        voc(tmp_path / "Annotations", f"{number}.jpg", *objects, image=False)
        save_image(tmp_path / f"JPEGImages/{number}.jpg")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("\n".join("01234"))
    _, data = read(tmp_path / "Annotations")
    names = [category["name"] for category in data["categories"]]
    expected = [
        (entry["category_id"] + 1, *BoxMode.convert(entry["bbox"], entry["bbox_mode"], BoxMode.XYWH_ABS))
        for record in load_voc_instances(str(tmp_path), "train", names)
        for entry in record["annotations"]
    ]
    assert [(entry["category_id"], *entry["bbox"]) for entry in data["annotations"]] == expected


def test_voc_floats_reversed_corners_polygons_and_parts(tmp_path):
    polygon = "<polygon><x1>3.5</x1><y1>2</y1><x2>20</x2><y2>2</y2><x3>20</x3><y3>30.5</y3></polygon>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    voc(
        tmp_path,
        "a.jpg",
        voc_object("cat", (3.5, 2.25, 20.0, 30.75)),
        voc_object("cat", (20, 30, 3, 2), part),
        voc_object("cat", (0, 0, 20, 30)),
        voc_object("cat", (3.5, 2, 20, 30.5), polygon),
    )
    _, data = read(tmp_path)
    first, second, third, fourth = data["annotations"]
    assert first["bbox"] == pytest.approx([2.5, 1.25, 17.5, 29.5]) and second["bbox"] == [2, 1, 18, 29]
    assert third["bbox"] == [0, 0, 20, 30]
    assert fourth["segmentation"] == [[2.5, 1.0, 19.0, 1.0, 19.0, 29.5]]
    assert fourth["area"] == pytest.approx(16.5 * 28.5 / 2)


def test_voc_difficult_objects_are_trained_on_and_ignored_in_an_evaluation(tmp_path):
    more = "<difficult>1</difficult><truncated>1</truncated>"
    voc(tmp_path, "a.jpg", voc_object("cat", (1, 1, 9, 9)), voc_object("cat", (20, 20, 30, 30), more))
    assert [entry["iscrowd"] for entry in read(tmp_path)[1]["annotations"]] == [0, 0]
    assert [entry["iscrowd"] for entry in read(tmp_path, split="val")[1]["annotations"]] == [0, 1]


def test_voc_sizes_may_be_missing(tmp_path):
    for number, size in enumerate((None, (0, 0), ("", ""), ("61.0", "43.0"))):
        voc(tmp_path, f"{number}.jpg", voc_object("cat", (1, 1, 9, 9)), size=size)
    checked, data = read(tmp_path)
    assert checked.issues == [] and {(image["width"], image["height"]) for image in data["images"]} == {SIZE}


@pytest.mark.parametrize(
    ("image", "filename"),
    [
        ("a.JPG", "a.JPG"),
        ("a.png", ""),
        ("a.png", "a"),
        ("a.png", "renamed.jpg"),
        ("other.png", "C:\\labels\\other.png"),
        ("other.png", "/home/me/other.png"),
        ("v1.2.png", "v1.2"),
        ("sub/a.jpg", "a.jpg"),
    ],
)
def test_the_image_of_a_voc_file(tmp_path, image, filename):
    voc(tmp_path / "xml", "a.jpg", voc_object("cat", (1, 1, 9, 9)), filename=filename, image=False)
    save_image(tmp_path / "images" / image)
    checked, data = read(tmp_path / "xml", tmp_path / "images")
    assert checked.issues == [] and data["images"][0]["file_name"] == image


def test_voc_devkit_with_label_images_of_the_same_name(tmp_path):
    voc(tmp_path / "Annotations", "a.jpg", voc_object("cat", (1, 1, 9, 9)), image=False)
    save_image(tmp_path / "JPEGImages/a.jpg")
    save_image(tmp_path / "SegmentationClass/a.png")
    for folder, images, name in (
        (tmp_path / "Annotations", None, "a.jpg"),
        (tmp_path, None, "JPEGImages/a.jpg"),
        (tmp_path, tmp_path / "JPEGImages", "a.jpg"),
    ):
        assert read(folder, images)[1]["images"][0]["file_name"] == name


def test_voc_files_of_several_folders_have_the_images_beside_them(tmp_path):
    for number, folder in enumerate(("a", "b"), start=1):
        voc(tmp_path / folder / "annotations", "1.jpg", voc_object("cat", (number, 1, 9, 9)), image=False)
        save_image(tmp_path / folder / "images/1.jpg")
    _, data = read(tmp_path)
    names = {image["id"]: image["file_name"] for image in data["images"]}
    assert [(names[a["image_id"]], a["bbox"][0]) for a in data["annotations"]] == [
        ("a/images/1.jpg", 0),
        ("b/images/1.jpg", 1),
    ]


def test_a_voc_file_with_several_possible_images_is_listed(tmp_path):
    voc(tmp_path / "xml", "1.jpg", voc_object("cat", (1, 1, 9, 9)), image=False)
    voc(tmp_path / "xml", "2.jpg", voc_object("cat", (1, 1, 9, 9)), image=False)
    for name in ("images/a/1.jpg", "images/b/1.jpg", "images/a/2.jpg"):
        save_image(tmp_path / name)
    checked, data = read(tmp_path / "xml", tmp_path / "images")
    assert [image["file_name"] for image in data["images"]] == ["a/2.jpg"]
    assert len(checked.issues) == 1 and "a/1.jpg, b/1.jpg" in checked.issues[0].reason


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("<object><name>cat</name></object>", "bbox"),
        (voc_object("cat", ("a", 1, 9, 9)), "bbox=['a', 1.0, 9.0, 9.0] is invalid"),
        (voc_object("cat", ("nan", 1, 9, 9)), "expected 4 finite numbers"),
        (voc_object("", (1, 1, 9, 9)), "category_id=None"),
        (voc_object("cat", (100, 1, 200, 9)), "bbox="),
    ],
)
def test_an_invalid_voc_object_is_skipped_and_listed_with_its_place(tmp_path, entry, reason):
    voc(tmp_path, "a.jpg", voc_object("cat", (1, 1, 9, 9)), entry)
    checked, data = read(tmp_path)
    assert len(data["annotations"]) == 1
    assert checked.issues[0].where == "a.xml object 2" and reason in checked.issues[0].reason


def test_a_missing_voc_image_is_listed(tmp_path):
    voc(tmp_path, "a.jpg", voc_object("cat", (1, 1, 9, 9)))
    voc(tmp_path, "b.jpg", voc_object("cat", (1, 1, 9, 9)), image=False)
    checked, data = read(tmp_path)
    assert [image["file_name"] for image in data["images"]] == ["a.jpg"]
    assert "'b.jpg' is not in" in str(checked.issues[0]) and "1 annotations" in checked.issues[0].action


def test_an_unusable_folder_is_a_one_line_error_with_its_name(tmp_path):
    def message(file=None, text=""):
        if file:
            (tmp_path / file).write_text(text)
        with pytest.raises(DatasetError) as raised:
            read(tmp_path, tmp_path)
        if file:
            (tmp_path / file).unlink()
        assert str(raised.value).startswith(str(tmp_path)) and "\n" not in str(raised.value)
        return str(raised.value)

    assert "Fix: give a COCO json." in message()
    assert "such as" in message("coco.json", "{}") and "coco.json" in message("coco.json", "{}")
    assert "a.json in it is a LabelMe file" in message("a.json", json.dumps({"shapes": [], "imagePath": "a.jpg"}))
    assert "a.txt in it is a YOLO label file" in message("a.txt", BOX_LINE)
    assert "CVAT" in message("a.xml", "<annotations><meta></meta></annotations>")
    assert "a.xml is not valid xml" in message("a.xml", "<annotation><object>")
    assert "none of 1 xml files has an object" in message("a.xml", "<annotation></annotation>")


def test_boxes_without_masks_need_a_model_without_masks(dataset):
    with pytest.raises(DatasetError, match="has boxes and no masks"):
        read(dataset({"a.jpg": BOX_LINE}), need_masks=True)


def test_check_dataset_reads_both(dataset, tmp_path, capsys):
    main = load_tool("check_dataset").main
    dataset({"v.jpg": BOX_LINE, "w.jpg": BOX_LINE}, split="val")
    file = dataset({"t.jpg": BOX_LINE})
    assert main(["--json", str(file), "--boxes-only"]) == 0
    assert "1 images, 1 annotations and 3 classes usable, 0 issues" in capsys.readouterr().out
    assert main(["--json", str(file), "--boxes-only", "--split", "val"]) == 0
    assert "2 images" in capsys.readouterr().out
    voc(tmp_path / "voc", "a.jpg", voc_object("cat", (1, 1, 9, 9)))
    assert main(["--json", str(tmp_path / "voc"), "--boxes-only"]) == 0
    (tmp_path / "a.json").write_text("{}")
    assert main(["--json", str(tmp_path / "a.json")]) == 2
    assert "give the folder" in capsys.readouterr().err


def test_training_data_may_be_a_yaml_without_image_folders(dataset, tmp_path, caplog):
    cfg = load_config("faster_rcnn_halo_h4", ["OUTPUT_DIR", str(tmp_path / "output")])
    dataset({"v.jpg": "2 0.5 0.5 0.5 0.5"}, split="val")
    file = str(dataset({"t.jpg": BOX_LINE}))
    names = ["user_train", "user_val"]
    try:
        with caplog.at_level(logging.INFO):
            cfg = register_user_data(cfg, file, None, file, None)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3 and "zebra, ant, cow" in caplog.text
        expected = [DatasetCatalog.get(name) for name in names]
        assert [records[0]["file_name"] for records in expected] == [
            str(tmp_path / "images/train/t.jpg"),
            str(tmp_path / "images/val/v.jpg"),
        ]
        assert expected[1][0]["annotations"][0]["category_id"] == 2
        assert MetadataCatalog.get("user_val").thing_classes == NAMES
        register_user_data_again(cfg.OUTPUT_DIR, names)
        assert [DatasetCatalog.get(name) for name in names] == expected
        with pytest.raises(ConfigError, match="must be given together"):
            register_user_data(cfg, str(tmp_path / "a.json"), None, None, None)
    finally:
        for name in names:
            if name in DatasetCatalog.list():
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
