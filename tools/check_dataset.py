#!/usr/bin/env python3
"""Check a COCO json before training, read each of its images to the end, and print the faults, one line each (the first 200 of them).

Exit code: 0 clean, 1 usable although with faults, 2 unusable, 130 stopped by Ctrl-C, with the faults found until then.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from halodet.data import validate_coco
from halodet.data.check_images import CheckStopped, check_images
from halodet.data.coco import LEFT_OUT
from halodet.errors import DatasetError
from halodet.utils.io import write_json


def main(arguments: list[str] | None = None) -> int:
    """Run the check on command-line arguments and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="FILE", help="COCO instances annotations")
    parser.add_argument(
        "--images", required=True, metavar="DIR", help="folder that the json's file names are relative to"
    )
    parser.add_argument("--boxes-only", action="store_true", help="do not ask for masks")
    parser.add_argument(
        "--no-images", action="store_true", help="open images no further than their headers, which takes seconds"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="how many read images at the same time (default: one for each core)"
    )
    parser.add_argument("--report", metavar="FILE", help="also write all faults to this json")
    options = parser.parse_args(arguments)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes is {options.processes}, expected 1 or more")
    stopped = None
    try:
        if options.report:  # it would be a pity to find out after an hour
            with tempfile.TemporaryFile(dir=Path(options.report).parent):
                pass
        checked = validate_coco(options.json, options.images, need_masks=not options.boxes_only)
        try:
            bad = [] if options.no_images else check_images(checked, options.images, processes=options.processes)
        except CheckStopped as why:
            bad, stopped = why.faults, why
        checked = dataclasses.replace(checked, faults=[*checked.faults, *bad])
        images = len(checked.dataset["images"])
        usable = (
            None if stopped else images - len({fault.where for fault in checked.faults if fault.action == LEFT_OUT})
        )
        if options.report:
            write_json(
                options.report,
                {"images_usable": usable, "faults": [dataclasses.asdict(fault) for fault in checked.faults]},
            )
        if len(bad) == images:
            raise DatasetError(
                f"{options.json}: none of its {images} images can be read (first {bad[0].where}: {bad[0].what})"
            )
    except DatasetError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"--report {options.report} cannot be written ({error.strerror or error}): give another path",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"{options.json}: stopped before its images were read", file=sys.stderr)
        return 130
    for line in checked.fault_lines():
        print(line)
    if stopped:
        print(f"{options.json}: stopped after {stopped.read} of {images} images, {len(checked.faults)} faults so far")
        return 130
    kept = checked.dataset
    print(
        f"{options.json}: {usable} images, {len(kept['annotations'])} annotations and {len(kept['categories'])} classes "
        f"usable, {len(checked.faults)} faults"
    )
    return 1 if checked.faults else 0


if __name__ == "__main__":
    sys.exit(main())
