#!/usr/bin/env python3
"""Run a script of timm (its train.py, validate.py, ...) with halodet's networks among timm's models.

    python tools/timm_train.py path/to/pytorch-image-models/train.py --model halodet_halonet_h4 --data-dir IMAGENET ...

Everything after the script's path is the script's own. Under torchrun put this tool in the script's place. timm's package does not carry
its scripts: they are in its repository, github.com/huggingface/pytorch-image-models, of the version that is installed.
"""

from __future__ import annotations

import os
import runpy
import sys


def main(argv: list[str] | None = None) -> int:
    """Run ``argv[0]`` with the arguments after it; 2 if that cannot be."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if argv else 2
    script = argv[0]
    if not os.path.isfile(script):
        print(f"error: {script} is no file, expected timm's train.py or another of its scripts", file=sys.stderr)
        return 2
    try:
        import halodet.models.timm_models  # noqa: F401 - registers the models
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        print("error: timm is not installed: pip install 'halodet[timm]'", file=sys.stderr)
        return 2
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # as python does for a script
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
