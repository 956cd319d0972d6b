#!/usr/bin/env python3
"""Convert weights between timm, HaloNet's classifier form, a bare backbone and a detector, and between .pth and .safetensors.

    python tools/convert_weights.py --input last.pth.tar --output backbone.safetensors --to detector
    python tools/convert_weights.py --input model_final.pth --output for_timm.pth --to timm
    python tools/convert_weights.py --input timm://halonet50ts.a1h_in1k --output filled.pth --to detector --into model_final.pth

No number changes. What has no place in the new form (heads, FPN) is listed. Exit code: 0 written, 2 not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from halodet.checkpoint import read_checkpoint, write_weights
from halodet.checkpoint.convert import FORMS, convert, rename_for
from halodet.checkpoint.preprocessing import preprocessing_of
from halodet.errors import CheckpointError

from detectron2.utils.file_io import PathManager
from torch import Tensor


def read(path: str, allow_pickle: bool) -> tuple[str, dict[str, Any]]:
    """The local file of ``path``, a path or a URL that Detectron2 knows, and what it holds."""
    local = path
    if "://" in path:
        try:
            local = PathManager.get_local_path(path)
        except CheckpointError:
            raise
        except Exception as error:  # of whichever handler and network
            raise CheckpointError(f"{path} could not be fetched ({type(error).__name__}: {error}).") from error
    checkpoint = read_checkpoint(local, allow_pickle=allow_pickle)
    if checkpoint.get("__author__") == "Caffe2":
        raise CheckpointError(
            f"{path} has Caffe2's names, which are matched only when loading: give the file itself as MODEL.WEIGHTS."
        )
    return local, checkpoint


def metadata_of(checkpoint: Mapping[str, Any], source: str) -> dict[str, str]:
    """What goes along with weights of the form ``source``: the pixels their first convolution takes, block and halo of attention."""
    said = checkpoint.get("metadata") or {}
    kept = {key: str(said[key]) for key in ("block_size", "halo_size") if key in said}
    names = (
        {"head.linear.weight"} if any(name.endswith("head.linear.weight") for name in checkpoint["model"]) else set()
    )
    convention = preprocessing_of(checkpoint, "", names if source == "classifier" else set())
    return kept | (convention.metadata() if convention else {})


def listed(title: str, tensors: Mapping[str, Tensor]) -> None:
    """Print ``title`` with the count of ``tensors``, and each of them, if there are any."""
    if tensors:
        print(f"{title}: {len(tensors)}")
    for name, tensor in tensors.items():
        print(f"  {name} {tuple(tensor.shape)}")


def run(options: argparse.Namespace) -> None:
    source, checkpoint = read(options.input, options.allow_pickle)
    tensors = checkpoint["model"]
    into_file, into = read(options.into, options.allow_pickle) if options.into else (None, {"model": None})
    into = into["model"]
    for path in (source, into_file):
        if path and os.path.exists(options.output) and os.path.samefile(path, options.output):
            raise CheckpointError(
                f"--output {options.output} is what is read, and would be overwritten: give another name."
            )
    if options.names:
        tensors = rename_for(options.names, tensors)
    done = convert(tensors, options.to, into=into, prefix=options.prefix)
    metadata = {"form": options.to, "source": os.path.basename(options.input)} | metadata_of(checkpoint, done.source)
    write_weights(options.output, done.tensors, metadata=metadata)
    print(f"{options.input}: {done.source}, {len(tensors)} tensors")
    print(
        f"{options.output}: {options.to}, {len(done.tensors)} tensors, {sum(t.numel() for t in done.tensors.values()) / 1e6:.2f} M numbers"
    )
    if options.to in ("timm", "classifier") and not any(name.startswith("head.") for name in done.tensors):
        print(
            "it has no classification head: timm's --pretrained-path takes it and makes a new one, --initial-checkpoint does not"
        )
    if into is not None:
        print(
            f"filled: {done.filled}; as in {options.into}: {len(into) - done.filled} (without its optimizer and iteration)"
        )
    if "pixel_std" in metadata:
        pixels = f"{metadata['input_format']} over {metadata['pixel_std']}"
        print(f"trained on {pixels}, which is saved beside them: training adapts the stem to its config")
        if options.to == "timm" and metadata["input_format"] != "RGB":
            print("timm's programs do not know, and feed RGB")
    listed(f"left out, without a place in the form {options.to}", done.left_out)
    listed(
        "of the backbone, but not in the input, so left as they were",
        {name: done.tensors[name] for name in done.unfilled},
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="a checkpoint, or a URL that Detectron2 knows, as timm://NAME"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="what to write, .safetensors or .pth")
    parser.add_argument(
        "--to", required=True, choices=FORMS, help="form to write; timm and classifier have the same names"
    )
    parser.add_argument(
        "--into", metavar="FILE", help="a detector's checkpoint to fill the backbone of; all else in it stays"
    )
    parser.add_argument(
        "--prefix", help="of the backbone in a detector (backbone.bottom_up. as under FPN; without FPN it is backbone.)"
    )
    parser.add_argument(
        "--names", choices=("halodet", "timm"), help="change between HaloNet's names and those of timm's own halonet_h1"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="run what a pickle asks for; only for files whose origin you trust"
    )
    options = parser.parse_args(argv)
    try:
        run(options)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
