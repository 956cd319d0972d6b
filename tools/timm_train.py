#!/usr/bin/env python3
"""Run a timm script (train.py, validate.py, ...) with halodet's models registered.

    python tools/timm_train.py path/to/pytorch-image-models/train.py --model halodet_halonet_h4 --data-dir IMAGENET ...

All arguments after the script are passed to it. Under torchrun, use this tool in place of the script. The timm package
does not contain its scripts: get them from github.com/huggingface/pytorch-image-models at the installed version.
"""

from __future__ import annotations

import os
import runpy
import sys


def main(argv: list[str] | None = None) -> int:
    """Run ``argv[0]`` with the following arguments; return 2 if the script or timm is missing."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if argv else 2
    script = argv[0]
    if not os.path.isfile(script):
        print(f"error: {script} is not a file. Fix: give the path of timm's train.py", file=sys.stderr)
        return 2
    try:
        import halodet.models.timm_models  # noqa: F401 - registers the models
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        print("error: timm is not installed. Fix: pip install 'halodet[timm]'", file=sys.stderr)
        return 2
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # as python does
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
