#!/usr/bin/env python3
"""Validate a COCO json, or a YOLO or Pascal VOC dataset, and decode all of its images.

Prints one line per issue (the first 200 of them).

Exit code: 0 no issues, 1 usable but with issues, 2 unusable, 130 interrupted (prints the issues found so far).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from halodet.data import Issue, ValidatedCoco, validate_coco
from halodet.data.check_images import CheckInterrupted, check_images
from halodet.data.dataset_report import count_usable_images, make_report, write_html_report
from halodet.errors import DatasetError
from halodet.utils.io import write_json


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", required=True, metavar="FILE", help="COCO json, YOLO data.yaml, or folder of Pascal VOC xml files"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder that the file names are relative to; not required for YOLO and VOC"
    )
    parser.add_argument("--split", choices=("train", "val"), default="train", help="split of a YOLO data.yaml")
    parser.add_argument("--boxes-only", action="store_true", help="do not require masks")
    parser.add_argument("--crowds-as-objects", action="store_true", help="treat annotations with iscrowd=1 as objects")
    parser.add_argument("--no-images", action="store_true", help="read image headers only, which takes seconds")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that read images (default: one per CPU)")
    parser.add_argument(
        "--report",
        action="append",
        default=[],
        metavar="FILE",
        help="also write a report: all issues as .json, or a page with charts and images as .html; may be repeated",
    )
    options = parser.parse_args(arguments)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes={options.processes} is invalid: expected 1 or more")
    for path in options.report:
        if Path(path).suffix.lower() not in (".json", ".html"):
            parser.error(f"--report={path} is invalid: expected a name that ends in .json or .html")
    return options


@contextlib.contextmanager
def _name_report(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"--report {path} cannot be written ({error.strerror or error}). Fix: give another path."
        ) from error


def _check_writable(path: str) -> None:
    with _name_report(path):
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass


def _write_reports(
    options: argparse.Namespace,
    checked: ValidatedCoco,
    issues: list[Issue],
    usable: int | None,
    interrupted: CheckInterrupted | None,
) -> None:
    remark = "Image headers only were read, so truncated images are not found." if options.no_images else ""
    if interrupted:
        total = len(checked.dataset["images"])
        remark = f"Interrupted after {interrupted.num_read:,} of {total:,} images: more issues are possible."
    for path in options.report:
        with _name_report(path):
            if Path(path).suffix.lower() == ".json":
                write_json(path, make_report(checked, issues, images_usable=usable))
            else:
                write_html_report(path, checked, issues, images_usable=usable, remark=remark)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool on command line arguments and return its exit code."""
    options = _parse(arguments)
    interrupted = None
    try:
        for path in options.report:  # fail before the images are read, not after
            _check_writable(path)
        flags = {
            "split": options.split,
            "need_masks": not options.boxes_only,
            "crowds_as_objects": options.crowds_as_objects,
        }
        checked = validate_coco(options.json, options.images, **flags)
        try:
            bad = [] if options.no_images else check_images(checked, processes=options.processes)
        except CheckInterrupted as error:
            bad, interrupted = error.issues, error
        issues = [*checked.issues, *bad]
        images = len(checked.dataset["images"])
        usable = None if interrupted else count_usable_images(checked, issues)
        _write_reports(options, checked, issues, usable, interrupted)
        if len(bad) == images:
            raise DatasetError(f"{options.json}: none of its {images} images can be read (first: {bad[0].reason}).")
    except DatasetError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{options.json}: interrupted before its images were read", file=sys.stderr)
        return 130
    for line in dataclasses.replace(checked, issues=issues).issue_lines():
        print(line)
    for line in checked.notes:
        print(f"note: {line}")
    if interrupted:
        print(
            f"{options.json}: interrupted after {interrupted.num_read} of {images} images, {len(issues)} issues so far"
        )
        return 130
    annotations, classes = len(checked.dataset["annotations"]), len(checked.dataset["categories"])
    print(
        f"{options.json}: {usable} images, {annotations} annotations and {classes} classes usable, {len(issues)} issues"
    )
    trainable = usable and not all(annotation["iscrowd"] for annotation in checked.dataset["annotations"])
    return 2 if not trainable else 1 if issues else 0


if __name__ == "__main__":
    sys.exit(main())
