"""draw on hand-made instances: what is drawn, where, in which color, and on images of awkward sizes."""

from halodet.inference import Detections, draw, fonts, visualize
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


@pytest.fixture
def fresh_fonts():
    """Forget what is known of the fonts, before and after a test that changes them."""

    def forget():
        for function in (fonts._installed_fonts, fonts._fonts, fonts._has_letter, fonts.render_text):
            getattr(function, "cache_clear", lambda: None)()
        fonts._warned.clear()

    forget()
    yield
    forget()


def test_letters_without_a_font_are_one_warning(caplog, monkeypatch, fresh_fonts):
    monkeypatch.setattr(fonts, "_FONTS", ())
    found = instances(400, 500, [[100, 50, 300, 350], [10, 50, 90, 350]], [0.9, 0.8], [0, 1])
    for _ in range(2):
        draw(grey(400, 500), found, ["猫の耳", "犬"], threshold=0.5)
    assert caplog.text.count("No installed font") == 1 and "猫の耳" in caplog.text
    assert "fonts-noto-cjk" in caplog.text


def test_a_letter_is_drawn_with_the_first_font_that_has_it(caplog, monkeypatch, fresh_fonts):
    if "dejavusans.ttf" not in fonts._installed_fonts():
        pytest.skip("DejaVu Sans is not installed")
    missing = next(letter for letter in "ΩЖשع" if not fonts._has_letter(len(fonts._fonts(16)) - 1, letter))
    both = fonts.render_text(f"cat {missing}", 16)
    assert not caplog.text and fonts._has_letter(0, missing)
    # Pillow's own font has no such letter: with it in front, only the letter comes from DejaVu Sans.
    first = fonts._fonts(16)
    monkeypatch.setattr(fonts, "_fonts", lambda size: first[::-1])
    fonts._has_letter.cache_clear()
    fonts.render_text.cache_clear()
    assert [run for _, run in fonts._runs(f"cat {missing}", 16)] == ["cat ", missing]
    assert not np.array_equal(fonts.render_text(f"cat {missing}", 16), both) and not caplog.text


@pytest.mark.parametrize("name", ["", " ", "two\nlines\tand a tab", "e\u0301", "a" * 300, "\x00"])
def test_any_name_is_one_line(name):
    found = instances(400, 500, [[100, 50, 300, 350]], [0.9], [0])
    height = fonts.render_text("x", 12).shape[0]
    assert fonts.render_text(name, 12).shape[0] == height
    assert changed(draw(grey(400, 500), found, [name], threshold=0.5))[:66, 104:110].any()


def test_a_class_without_a_name_is_drawn_by_its_number():
    found = instances(400, 500, [[100, 50, 300, 350]], [0.9], [2])
    assert np.array_equal(
        draw(grey(400, 500), found, NAMES, threshold=0.5),
        draw(grey(400, 500), found, [*NAMES, "class 2"], threshold=0.5),
    )


def test_labels_do_not_cover_each_other_where_there_is_room():
    boxes = [[100, 50, 300, 350], [100, 50, 310, 340], [102, 52, 290, 345]]
    one = changed(draw(grey(400, 500), instances(400, 500, boxes[:1], [0.9], [0]), NAMES, threshold=0.5))
    three = draw(grey(400, 500), instances(400, 500, boxes, [0.9, 0.8, 0.7], [0, 0, 0]), NAMES, threshold=0.5)
    lines = sum(changed(draw(grey(400, 500), instances(400, 500, [b], [0.9], [0]), [""], threshold=0.5)) for b in boxes)
    label = one[55:70, 105:160].mean()
    assert label > 0.5 and (changed(three) & (lines == 0)).sum() > 2 * 500  # two more labels elsewhere


def test_numpy_detections_are_drawn_as_instances():
    found = instances(400, 500, [[100, 50, 300, 350], [20, 30, 60, 70]], [0.9, 0.8], [0, 1], masks=True)
    found.pred_keypoints = torch.rand(2, 3, 3) * 100
    for image in (grey(400, 500), grey(100, 120), grey(9000, 4000)):
        drawings = [draw(image, f, NAMES, threshold=0.5) for f in (found, Detections.from_instances(found))]
        assert np.array_equal(*drawings)
    outputs = {"instances": found}, {"instances": Detections.from_instances(found)}
    assert np.array_equal(*(draw_output(grey(400, 500), output, NAMES, threshold=0.5) for output in outputs))


def test_colors_of_the_first_classes_differ():
    colors = np.array([visualize._color(k) for k in range(20)], float)
    distances = np.abs(colors[:, None] - colors[None]).max(axis=2) + 1000 * np.eye(20)
    assert distances.min() > 20 and all(np.abs(colors[k] - colors[k + 1]).max() > 80 for k in range(19))


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
    numpy_output = {kind: (labels.numpy(), infos) if kind == "panoptic_seg" else labels.numpy()}
    names = ["sky", "sea", "sand"]
    assert np.array_equal(draw_output(grey(200, 360), numpy_output, NAMES, names, threshold=0.5), drawn)
    if kind == "panoptic_seg":
        assert np.abs(colors[0] - 40).max() <= 2, "void is not drawn"
    else:
        assert np.abs(colors[0] - 40).max() > 10


def test_classes_without_a_name_are_not_drawn():
    labels = np.zeros((200, 360), np.int64)
    labels[:, 100:] = 255
    drawn = changed(draw_output(grey(200, 360), {"sem_seg": labels}, NAMES, ["sky"], threshold=0.5))
    width = drawn.shape[1]
    assert drawn[:, : width * 90 // 360].mean() > 0.9 and not drawn[:, width * 180 // 360 :].any()
    assert not changed(draw_output(grey(200, 360), {"sem_seg": labels}, NAMES, [], threshold=0.5)).any()


def test_a_large_panoptic_map_is_shrunk():
    labels = torch.ones(60, 6000, dtype=torch.long)
    output = {"panoptic_seg": (labels, [{"id": 1, "isthing": True, "category_id": 1, "score": 0.9}])}
    assert draw_output(grey(60, 6000), output, NAMES, ["sky"], threshold=0.5).shape == (41, 4096, 3)


def test_proposals_above_the_threshold_are_drawn():
    found = Instances((400, 500), proposal_boxes=Boxes(torch.tensor([[100.0, 50, 300, 350], [350, 50, 450, 350]])))
    found.objectness_logits = torch.tensor([2.0, -2.0])
    drawn = changed(draw_output(grey(400, 500), {"proposals": found}, NAMES, threshold=0.5))
    assert drawn[100:340, 97:104].any(axis=1).all() and not drawn[:, 330:].any()
