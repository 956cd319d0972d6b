"""draw on hand-made instances: what is drawn, where, in which color, and on images of awkward sizes."""

from halodet.inference import draw, visualize
from halodet.inference.visualize import draw_output

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

NAMES = ["cat", "dog"]


def instances(height, width, boxes, scores, classes, masks=False):
    result = Instances((height, width), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    result.scores, result.pred_classes = torch.tensor(scores), torch.tensor(classes)
    if masks:
        result.pred_masks = torch.zeros(len(scores), height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(result.pred_masks, torch.tensor(boxes).round().int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
    return result


def changed(drawing, level=40):
    return (np.abs(drawing.astype(int) - level) > 12).any(axis=2)


def grey(height, width):
    return np.full((height, width, 3), 40, np.uint8)


def test_the_box_is_drawn_where_it_is():
    drawing = draw(grey(400, 500), instances(400, 500, [[100, 50, 300, 350]], [0.9], [0]), NAMES, threshold=0.5)
    assert drawing.shape == (400, 500, 3) and drawing.dtype == np.uint8
    assert changed(drawing)[100:340, 97:104].any(axis=1).all() and changed(drawing)[100:340, 297:304].any(axis=1).all()
    assert (
        not changed(drawing)[100:340, 110:290].any()
        and not changed(drawing)[:45].any()
        and not changed(drawing)[:, 310:].any()
    )


@pytest.mark.parametrize("name", ["$$", "Ba$$in", "a$b_$c", "10$-20$", "100%$ and $", "^_\\{"])
def test_names_are_drawn_as_they_are(name):
    """Regression: matplotlib read "$" as the start of a formula and failed."""
    found = instances(400, 500, [[100, 50, 300, 350]], [0.9], [0])
    plain, drawn = (draw(grey(400, 500), found, [text], threshold=0.5) for text in ("x" * len(name), name))
    assert not np.array_equal(plain, drawn)  # the labels differ
    assert changed(drawn)[:60].any()


def test_letters_without_a_font_are_one_warning(caplog, recwarn, monkeypatch):
    monkeypatch.setattr(visualize, "_installed_fonts", frozenset)
    visualize._warn_of_font.cache_clear()
    found = instances(400, 500, [[100, 50, 300, 350], [10, 50, 90, 350]], [0.9, 0.8], [0, 0])
    for _ in range(2):
        draw(grey(400, 500), found, ["猫の耳"], threshold=0.5)
    assert caplog.text.count("猫の耳") == 1 and not [w for w in recwarn if "Glyph" in str(w.message)]


def test_the_mask_is_filled():
    boxes = [[100, 50, 300, 350]]
    drawing = draw(grey(400, 500), instances(400, 500, boxes, [0.9], [0], masks=True), NAMES, threshold=0.5)
    assert changed(drawing)[100:340, 110:290].mean() > 0.95


def test_below_the_threshold_nothing_is_drawn_and_at_it_is():
    found = instances(400, 500, [[100, 50, 300, 350]], [0.5], [0], masks=True)
    assert not changed(draw(grey(400, 500), found, NAMES, threshold=0.51)).any()
    assert changed(draw(grey(400, 500), found, NAMES, threshold=0.5)).any()


def test_no_instances_leave_the_image_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    drawing = draw(image, instances(400, 500, np.zeros((0, 4)), [], []), NAMES, threshold=0.5)
    assert np.array_equal(drawing, image)  # in BGR order as well


def test_a_class_keeps_its_colour_and_classes_differ():
    boxes = [[50, 50, 200, 350], [250, 50, 450, 350]]

    def colors(classes):
        drawing = draw(
            grey(400, 500), instances(400, 500, boxes, [0.9, 0.8], classes, masks=True), NAMES, threshold=0.5
        )
        return drawing[250, 125].tolist(), drawing[250, 350].tolist()

    cat, dog = colors([0, 1])
    assert cat != dog
    assert colors([1, 0]) == (dog, cat) and colors([0, 0]) == (cat, cat)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (4, 4)),
        ((64, 100), (256, 400)),
        ((160, 200), (320, 400)),
        ((3, 8000), (2, 4096)),
        ((1, 9000), (1, 4096)),
        ((5000, 1000), (4096, 819)),
    ],
)
def test_awkward_sizes_are_drawn_at_a_readable_one(size, expected, masks):
    height, width = size
    found = instances(
        height,
        width,
        [[0, 0, width, height], [width / 4, height / 4, width / 2, height / 2]],
        [0.9, 0.8],
        [0, 1],
        masks,
    )
    drawing = draw(grey(height, width), found, NAMES, threshold=0.5)
    assert drawing.shape == (*expected, 3)
    assert changed(drawing).any()


def test_boxes_and_masks_shrink_with_a_large_image():
    found = instances(5120, 3000, [[750, 1280, 2250, 3840]], [0.9], [0], masks=True)
    drawing = draw(grey(5120, 3000), found, NAMES, threshold=0.5)  # to 4096 x 2400
    rows, columns = np.nonzero(changed(drawing))
    assert (abs(rows.min() - 1024) < 25) and abs(rows.max() - 3072) < 25
    assert (abs(columns.min() - 600) < 25) and abs(columns.max() - 1800) < 25


def test_a_degenerate_box_and_an_empty_mask_do_not_stop_the_drawing():
    boxes = [[10, 10, 10, 10], [100, 50, 300, 350]]
    drawing = draw(grey(400, 500), instances(400, 500, boxes, [0.9, 0.9], [0, 1], masks=True), NAMES, threshold=0.5)
    assert changed(drawing)[200, 200]


def test_keypoints_are_drawn_where_they_are():
    found = instances(400, 500, [[100, 50, 300, 350]], [0.9], [0])
    found.pred_keypoints = torch.tensor([[[150.0, 120.0, 1.0], [250.0, 300.0, 1.0], [200.0, 200.0, 0.0]]])
    drawn = changed(draw(grey(400, 500), found, NAMES, threshold=0.5))
    assert drawn[118:123, 148:153].all() and drawn[298:303, 248:253].all()
    assert not drawn[190:210, 190:210].any(), "a point that is not visible"


@pytest.mark.parametrize("kind", ["panoptic_seg", "sem_seg"])
def test_segments_are_filled_with_the_color_of_their_class(kind):
    labels = torch.zeros(200, 360, dtype=torch.long)
    labels[:, 120:240], labels[:, 240:] = 1, 2
    output = {"sem_seg": torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).float()}
    if kind == "panoptic_seg":
        infos = [{"id": i, "isthing": False, "category_id": i} for i in (1, 2)]
        output["panoptic_seg"] = (labels, infos)
    drawn = draw_output(grey(200, 360), output, NAMES, ["sky", "sea", "sand"], threshold=0.5)
    scale = drawn.shape[1] / 360
    colors = [drawn[int(20 * scale), int(x * scale)].astype(int) for x in (60, 180, 300)]
    assert np.abs(colors[1] - colors[2]).max() > 30
    if kind == "panoptic_seg":
        assert np.abs(colors[0] - 40).max() <= 2, "void is not drawn"
    else:
        assert np.abs(colors[0] - 40).max() > 10


def test_a_large_panoptic_map_is_shrunk():
    labels = torch.ones(60, 6000, dtype=torch.long)
    output = {"panoptic_seg": (labels, [{"id": 1, "isthing": True, "category_id": 1, "score": 0.9}])}
    assert draw_output(grey(60, 6000), output, NAMES, ["sky"], threshold=0.5).shape == (41, 4096, 3)


def test_proposals_above_the_threshold_are_drawn():
    found = Instances((400, 500), proposal_boxes=Boxes(torch.tensor([[100.0, 50, 300, 350], [350, 50, 450, 350]])))
    found.objectness_logits = torch.tensor([2.0, -2.0])
    drawn = changed(draw_output(grey(400, 500), {"proposals": found}, NAMES, threshold=0.5))
    assert drawn[100:340, 97:104].any(axis=1).all() and not drawn[:, 330:].any()
