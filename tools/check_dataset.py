#!/usr/bin/env python3
"""Check a COCO json and its images before training, and print its faults, one line each (the first 200 of them).

Exit code: 0 clean, 1 usable although with faults, 2 unusable.
"""

from __future__ import annotations

import argparse
import sys

from halodet.data import DatasetError, check_coco_json


def main(arguments: list[str] | None = None) -> int:
    """Run the check on command-line arguments and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="FILE", help="COCO instances annotations")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder that the json's file names are relative to")
    parser.add_argument("--boxes-only", action="store_true", help="do not ask for masks")
    options = parser.parse_args(arguments)
    try:
        checked = check_coco_json(options.json, options.images, need_masks=not options.boxes_only)
    except DatasetError as error:
        print(error, file=sys.stderr)
        return 2
    for line in checked.fault_lines():
        print(line)
    kept = checked.dataset
    print(
        f"{options.json}: {len(kept['images'])} images, {len(kept['annotations'])} annotations and {len(kept['categories'])} classes "
        f"usable, {len(checked.faults)} faults"
    )
    return 1 if checked.faults else 0


if __name__ == "__main__":
    sys.exit(main())
