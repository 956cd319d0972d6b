"""Large-scale jitter and cropping against an independent computation of image, masks and boxes."""

import functools

from halodet.config.load import load_config
from halodet.data.dataset_mapper import RobustDatasetMapper
from halodet.data.transforms import RandomCrop, build_augmentations
from halodet.errors import ConfigError

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

WIDTH, HEIGHT, SIZE = 60, 40, 48
STAR = [30, 2, 35, 15, 58, 15, 40, 23, 50, 38, 30, 28, 10, 38, 20, 23, 2, 15, 25, 15]  # concave
LSJ = ["INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.SIZE", str(SIZE), "INPUT.RANDOM_FLIP", "none"]


@functools.cache
def config(*opts):
    return load_config("quick/mask_rcnn_halo_shapes", list(map(str, opts)))


@pytest.fixture
def entry(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "width": WIDTH,
        "height": HEIGHT,
        "pixels": pixels[:, :, ::-1],
    }


def annotations(rle):
    mask = mask_util.merge(mask_util.frPyObjects([STAR], HEIGHT, WIDTH)) if rle else [STAR]
    return [{"bbox": [2, 2, 56, 36], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": mask}]


def rasterize(polygon, height, width, scale=8):
    """The polygon's mask, by OpenCV on a finer grid, independent of pycocotools' rasterizer."""
    canvas = np.zeros((height * scale, width * scale), np.uint8)
    cv2.fillPoly(canvas, [np.rint(np.asarray(polygon).reshape(-1, 2) * scale).astype(np.int32)], 1)
    return canvas.reshape(height, scale, width, scale).mean(axis=(1, 3)) > 0.5


@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_lsj_equals_resizing_then_cropping_or_padding(entry, seed, rle):
    mapper = RobustDatasetMapper(config(*LSJ), is_train=True)
    np.random.seed(seed)
    sample = mapper({**entry, "annotations": annotations(rle)})
    np.random.seed(seed)
    factor, where = np.random.uniform(0.1, 2.0), np.random.uniform(0.0, 1.0)

    ratio = min(SIZE * factor / HEIGHT, SIZE * factor / WIDTH)
    width, height = round(WIDTH * ratio), round(HEIGHT * ratio)
    left, top = round(max(0, width - SIZE) * where), round(max(0, height - SIZE) * where)
    scaled = np.asarray(Image.fromarray(entry["pixels"]).resize((width, height), Image.BILINEAR))
    expected = np.full((SIZE, SIZE, 3), 128, np.uint8)
    part = scaled[top : top + SIZE, left : left + SIZE]
    expected[: part.shape[0], : part.shape[1]] = part
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), expected)

    star = np.array(STAR).reshape(-1, 2) * (width / WIDTH, height / HEIGHT)
    whole = rasterize(star, max(height, SIZE), max(width, SIZE))
    mask = np.zeros((SIZE, SIZE), bool)
    cut = whole[top : top + SIZE, left : left + SIZE]
    mask[: cut.shape[0], : cut.shape[1]] = cut
    (found,) = sample["instances"].gt_masks.tensor.numpy()
    # Rasterizers, and scaling a finished mask, differ along the outline by about half a pixel.
    outline = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) != cv2.erode(mask.astype(np.uint8), np.ones((3, 3)))
    thick = cv2.dilate(outline.astype(np.uint8), np.ones((3, 3)), iterations=int(np.ceil(ratio)) if rle else 1).astype(
        bool
    )
    assert not (found != mask)[~thick].any() and found.any()
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert sample["instances"].gt_boxes.tensor[0].tolist() == box


def test_lsj_draws_scales_evenly_between_its_bounds():
    resize, crop, flip = build_augmentations(config("INPUT.LSJ.ENABLED", "True"), is_train=True)
    image = np.zeros((512, 1024, 3), np.uint8)
    np.random.seed(0)
    widths = np.array([resize.get_transform(image).new_w for _ in range(400)]) / 1024
    assert widths.min() >= 0.1 and widths.max() <= 2 and abs(widths.mean() - 1.05) < 0.1
    assert crop.get_transform(image).apply_image(image).shape == (1024, 1024, 3)
    assert isinstance(flip, T.RandomFlip)


def test_lsj_does_not_change_evaluation():
    names = [type(a).__name__ for a in build_augmentations(config("INPUT.LSJ.ENABLED", "True"), is_train=False)]
    assert names == ["ResizeShortestEdge"]


@pytest.mark.parametrize("seed", range(5))
def test_cropped_polygons_cover_what_is_left_of_the_mask(seed):
    np.random.seed(seed)
    transform = RandomCrop("absolute", (17, 23)).get_transform(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    whole = rasterize(STAR, HEIGHT, WIDTH)
    left = whole[transform.y0 : transform.y0 + 17, transform.x0 : transform.x0 + 23]
    polygons = transform.apply_polygons([np.array(STAR).reshape(-1, 2)])
    drawn = rasterize(polygons[0], 17, 23) if polygons else np.zeros((17, 23), bool)
    assert (drawn != left).mean() < 0.02 and left.any()


def test_a_polygon_outside_the_crop_is_dropped():
    transform = RandomCrop("absolute", (5, 5)).get_transform(np.zeros((5, 5, 3), np.uint8))
    assert transform.apply_polygons([np.array([[10.0, 10], [20, 10], [20, 20]])]) == []


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (["INPUT.LSJ.MIN_SCALE", "3.0"], "INPUT.LSJ.MIN_SCALE=3.0"),
        (["INPUT.LSJ.SIZE", "0"], "INPUT.LSJ.SIZE=0"),
        (["INPUT.LSJ.ENABLED", "True", "INPUT.CROP.ENABLED", "True"], "INPUT.CROP.ENABLED"),
        (["INPUT.COPY_PASTE.PROBABILITY", "0.0"], "PROBABILITY=0.0"),
        (["INPUT.COPY_PASTE.ENABLED", "True", "MODEL.MASK_ON", "False"], "MODEL.MASK_ON"),
        (["INPUT.COPY_PASTE.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"], "KEYPOINT_ON"),
        (["DATALOADER.MAX_BAD_IMAGES", "5.0"], "DATALOADER.MAX_BAD_IMAGES=5.0"),
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT=L"),
    ],
)
def test_invalid_keys_are_an_error(opts, says):
    with pytest.raises(ConfigError, match=says):
        config(*opts)
