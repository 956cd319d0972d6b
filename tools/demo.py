#!/usr/bin/env python3
"""Draw a trained detector's findings on images, and save them as COCO-style JSON.

    python tools/demo.py --config-file configs/mask_rcnn_halo_h4.yaml --input photos/ more/*.png --output drawn \\
        --opts MODEL.WEIGHTS output/mask_rcnn_halo_h4/model_final.pth

Exit code: 0 if every image was drawn, 1 if some were not, 2 if nothing could start, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterator
from typing import Any

from halodet.config.load import load_config
from halodet.errors import CheckpointError, ConfigError, ImageError
from halodet.inference import ClassesError, Predictor, PredictorError, draw, read_image, to_coco, write_json

import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from PIL import Image
from tqdm import tqdm

DETECTIONS_FILE = "detections.json"
NOT_IMAGES = frozenset(
    ".bz2 .cfg .csv .doc .docx .gz .htm .html .ini .ipynb .json .jsonl .log .md .mp4 .npy .npz .pdf .pickle .pkl .pth .pt .py .rst .sh"
    " .tar .tgz .toml .tsv .txt .xls .xlsx .xml .yaml .yml .zip".split()
)


class UsageError(ValueError):
    """A command line that cannot start; the message is one sentence."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        files = find_images(args.input, args.output)
        predictor = Predictor(_load_config(args), allow_pickle=args.allow_pickle)
        os.makedirs(args.output, exist_ok=True)
    except (ConfigError, ClassesError, PredictorError, UsageError, CheckpointError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"--output {args.output} cannot be made a folder ({error.strerror}).")
    return run(predictor, files, args.output, args.confidence_threshold)


def find_images(inputs: list[str], output: str) -> list[str]:
    """List the files that the inputs (files, folders, glob patterns) name, each once, in the order given and by name in folders.

    Raises:
        UsageError: an input matches nothing, or a file lies in the output folder, where a drawing could replace it.
    """
    found: dict[str, str] = {}
    for given in inputs:
        # A file whose name holds brackets or a star is that file, not a pattern.
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        files = [file for path in paths for file in (_walk(path, output) if os.path.isdir(path) else [path])]
        if not files:
            raise UsageError(f"--input {given} matches no {'image' if paths else 'file'}.")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    for real, file in found.items():
        if os.path.dirname(real) == os.path.realpath(output):
            raise UsageError(
                f"{file} lies in --output {output}, where a drawing could replace it; give another output folder."
            )
    return list(found.values())


def run(predictor: Predictor, files: list[str], output: str, threshold: float) -> int:
    """Draw every file into ``output``, write the detections found so far whatever happens, and return the exit code."""
    categories = [{"id": entry["id"], "name": entry["name"]} for entry in predictor.classes]
    coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}
    used = {DETECTIONS_FILE}
    refused, code = 0, 0
    try:
        for file in tqdm(files, unit="image", disable=len(files) < 2):
            try:
                _draw_one(predictor, file, output, threshold, coco, used)
            except ImageError as error:
                refused += 1
                _say(str(error))
    except KeyboardInterrupt:
        code = 130
        _say("stopped by Ctrl-C.")
    except PredictorError as error:
        code = 2
        _say(str(error))
    except OSError as error:
        code = 1
        _say(
            f"a drawing could not be written to {output} ({error.strerror or error}); free space or choose another --output."
        )
    finally:
        try:
            write_json(os.path.join(output, DETECTIONS_FILE), coco)
        except OSError as error:
            code = code or 1
            _say(f"{os.path.join(output, DETECTIONS_FILE)} could not be written ({error.strerror or error}).")
    drawn = len(coco["images"])
    left = len(files) - drawn - refused
    print(f"{drawn} drawn, {refused} refused{f', {left} not reached' if left else ''}: {output}")
    return code or int(refused > 0)


def _draw_one(
    predictor: Predictor,
    file: str,
    output: str,
    threshold: float,
    coco: dict[str, list[dict[str, Any]]],
    used: set[str],
) -> None:
    image = read_image(file)
    instances = predictor(image)
    drawing = draw(image, instances, [entry["name"] for entry in predictor.classes], threshold=threshold)
    name = _free_name(os.path.basename(file), used)
    Image.fromarray(drawing[:, :, ::-1]).save(os.path.join(output, name), quality=95)
    image_id = len(coco["images"]) + 1
    annotations = []
    for result in to_coco(
        instances[instances.scores >= threshold], image_id, [entry["id"] for entry in predictor.classes]
    ):
        mask = result.get("segmentation")
        area = float(mask_util.area(mask)) if mask else result["bbox"][2] * result["bbox"][3]
        annotations.append(
            {"id": len(coco["annotations"]) + len(annotations) + 1, **result, "area": area, "iscrowd": 0}
        )
    # Recorded last, so that detections.json never speaks of a drawing that is not there.
    used.add(name.casefold())
    height, width = image.shape[:2]
    coco["images"].append({"id": image_id, "file_name": file, "width": width, "height": height, "drawing": name})
    coco["annotations"] += annotations


def _free_name(name: str, used: set[str]) -> str:
    """The drawing's name: the image's own, with .png added unless it is JPEG or PNG, and numbered when it is taken."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in (".jpg", ".jpeg", ".png"):
        stem, suffix = name, ".png"
    candidate, number = stem + suffix, 2
    while candidate.casefold() in used:  # casefold: some file systems do not tell A.jpg from a.jpg
        candidate, number = f"{stem}_{number}{suffix}", number + 1
    return candidate


def _walk(folder: str, output: str) -> Iterator[str]:
    output = os.path.realpath(output)
    for root, folders, names in os.walk(folder):
        # The drawings of an earlier run are no input.
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(root, f)) != output
        )
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() not in NOT_IMAGES:
                yield os.path.join(root, name)


def _load_config(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts).clone()
    cfg.defrost()
    # As in Detectron2's demo: what would not be drawn need not be found, and what should be drawn must not be dropped by the model.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
    return cfg


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the config the weights were trained with")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="image files, folders (searched with their subfolders) or quoted glob patterns; in folders hidden files and files with a"
        f" suffix that is clearly no image's are left out ({' '.join(sorted(NOT_IMAGES))}), files named directly are always tried",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help=f"folder for the drawings and {DETECTIONS_FILE}")
    parser.add_argument(
        "--confidence-threshold", type=_score, default=0.5, metavar="SCORE", help="least score to keep (default: 0.5)"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read pickle files that may run code")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides, such as MODEL.WEIGHTS; must come last",
    )
    return parser


def _score(text: str) -> float:
    score = float(text)
    if not 0.0 <= score <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return score


_score.__name__ = "number"  # argparse names the type in its message


def _fail(message: str) -> int:
    print(f"demo.py: error: {message}", file=sys.stderr)
    return 2


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
