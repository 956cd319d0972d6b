#!/usr/bin/env python3
"""Validate a COCO json, decode all of its images, and print one line per issue (the first 200 of them).

Exit code: 0 no issues, 1 usable but with issues, 2 unusable, 130 interrupted (prints the issues found so far).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from halodet.data import validate_coco
from halodet.data.check_images import CheckInterrupted, check_images
from halodet.data.coco_validator import SKIPPED_IN_TRAINING
from halodet.errors import DatasetError
from halodet.utils.io import write_json


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="FILE", help="COCO instances annotations")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder that the file names are relative to")
    parser.add_argument("--boxes-only", action="store_true", help="do not require masks")
    parser.add_argument("--crowds-as-objects", action="store_true", help="treat annotations with iscrowd=1 as objects")
    parser.add_argument("--no-images", action="store_true", help="read image headers only, which takes seconds")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that read images (default: one per CPU)")
    parser.add_argument("--report", metavar="FILE", help="also write all issues to this json")
    options = parser.parse_args(arguments)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes={options.processes} is invalid: expected 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the tool on command line arguments and return its exit code."""
    options = _parse(arguments)
    interrupted = None
    try:
        if options.report:  # fail before the images are read, not after
            with tempfile.TemporaryFile(dir=Path(options.report).parent):
                pass
        flags = {"need_masks": not options.boxes_only, "crowds_as_objects": options.crowds_as_objects}
        checked = validate_coco(options.json, options.images, **flags)
        try:
            bad = [] if options.no_images else check_images(checked, options.images, processes=options.processes)
        except CheckInterrupted as error:
            bad, interrupted = error.issues, error
        issues = [*checked.issues, *bad]
        images = len(checked.dataset["images"])
        usable = None if interrupted else images - len({i.where for i in issues if i.action == SKIPPED_IN_TRAINING})
        if options.report:
            report = {"images_usable": usable, "issues": [dataclasses.asdict(issue) for issue in issues]}
            write_json(options.report, report)
        if len(bad) == images:
            raise DatasetError(f"{options.json}: none of its {images} images can be read (first: {bad[0].reason}).")
    except DatasetError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or error
        print(f"--report {options.report} cannot be written ({reason}). Fix: give another path.", file=sys.stderr)
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
    return 2 if not usable else 1 if issues else 0


if __name__ == "__main__":
    sys.exit(main())
