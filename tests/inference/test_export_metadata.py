"""ExportMetadata: what is written can be read, and what is wrong with a description is named."""

import json

from halodet.inference.export_metadata import ExportedModelError, ExportMetadata

import pytest

VALUES = {
    "format_version": 1,
    "halodet": "0.1.0",
    "detector": "GeneralizedRCNN",
    "input_format": "BGR",
    "min_size": 800,
    "max_size": 1333,
    "classes": [{"id": 1, "name": "person"}, {"id": 90, "name": "猫 $"}],
    "stuff_classes": ["things", "sky"],
    "score_threshold": 0.05,
    "mask_threshold": 0.5,
    "outputs": ["boxes", "scores", "classes", "masks", "sem_seg"],
    "sem_seg_stride": 4,
    "panoptic": {"overlap_threshold": 0.5, "stuff_area_limit": 4096, "instances_confidence_threshold": 0.5},
    "weights_sha256": "0" * 64,
    "precision": "float32",
}


def read(**changes):
    return ExportMetadata.from_json(json.dumps({**VALUES, **changes}))


def test_what_is_written_is_read():
    metadata = read()
    assert json.loads(metadata.to_json()) == VALUES
    assert ExportMetadata.from_json(metadata.to_json()) == metadata
    assert "猫" in metadata.to_json()


def test_unknown_keys_are_ignored_and_optional_ones_have_defaults():
    required = ("format_version", "detector", "input_format", "min_size", "max_size", "classes", "weights_sha256")
    values = {key: VALUES[key] for key in required} | {"outputs": ["sem_seg"], "later": 1}
    metadata = ExportMetadata.from_json(json.dumps(values))
    assert metadata.panoptic is None and metadata.sem_seg_stride == 4 and metadata.stuff_classes == []
    for key in [*required, "outputs"]:
        with pytest.raises(ExportedModelError, match=f"no {key}"):
            ExportMetadata.from_json(json.dumps({name: value for name, value in values.items() if name != key}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", 0),
        ("format_version", "1"),
        ("detector", ""),
        ("input_format", "bgr"),
        ("min_size", -1),
        ("max_size", 0),
        ("max_size", 13.5),
        ("classes", [{"id": "1", "name": "a"}]),
        ("classes", {"a": 1}),
        ("stuff_classes", [1]),
        ("score_threshold", 1.5),
        ("mask_threshold", None),
        ("outputs", []),
        ("outputs", ["boxes", "scores", "classes", "keypoints"]),
        ("outputs", ["boxes", "scores"]),
        ("outputs", ["masks"]),
        ("outputs", "boxes"),
        ("sem_seg_stride", 0),
        ("panoptic", {"overlap_threshold": 0.5}),
        ("weights_sha256", "abc"),
        ("precision", "float64"),
    ],
)
def test_an_invalid_value_is_named(key, value):
    with pytest.raises(ExportedModelError, match=f"metadata {key}=") as caught:
        read(**{key: value})
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_panoptic_needs_masks_and_semantic_segmentation():
    with pytest.raises(ExportedModelError, match="panoptic"):
        read(outputs=["sem_seg"])


def test_a_newer_file_and_text_that_is_no_description():
    with pytest.raises(ExportedModelError, match="format_version=2 .*update halodet to 9.0"):
        read(format_version=2, halodet="9.0", outputs=["rotated_boxes"])
    for text in ("", "{", "[1]", "null"):
        with pytest.raises(ExportedModelError, match="metadata"):
            ExportMetadata.from_json(text)
