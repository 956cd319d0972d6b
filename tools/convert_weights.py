#!/usr/bin/env python3
"""Convert weights between timm, HaloNet classifiers, bare backbones and detectors, and between .pth and .safetensors.

    python tools/convert_weights.py --input last.pth.tar --output backbone.safetensors --to detector
    python tools/convert_weights.py --input model_final.pth --output for_timm.pth --to timm
    python tools/convert_weights.py --input timm://halonet50ts.a1h_in1k --output filled.pth --to detector \\
        --into model_final.pth

The values are unchanged. Tensors without a place in the new form (heads, FPN) are listed. Exit code: 0 if the file was
written, 2 for invalid arguments or input, 74 if it cannot be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from halodet.checkpoint import LoadedCheckpoint, read_weights, write_weights
from halodet.checkpoint.key_mapping import FORMS, convert
from halodet.checkpoint.preprocessing import preprocessing_of
from halodet.errors import CheckpointError, HalodetError

from torch import Tensor


def run(args: argparse.Namespace) -> None:
    """Convert as the arguments say and print a summary."""
    source = _read(args.input, args.allow_pickle)
    target = _read(args.into, args.allow_pickle) if args.into else None
    for loaded in filter(None, (source, target)):
        if os.path.exists(args.output) and os.path.samefile(loaded.path, args.output):
            raise CheckpointError(f"--output {args.output} is invalid: it is an input. Fix: use another name.")
    tensors = source.checkpoint["model"]
    into = target.checkpoint["model"] if target else None
    done = convert(tensors, args.to, into=into)
    metadata = {"form": args.to, "source": os.path.basename(args.input), **_metadata(source.checkpoint, done.source)}
    write_weights(args.output, done.tensors, metadata=metadata)
    numbers = sum(tensor.numel() for tensor in done.tensors.values())
    print(f"{args.input}: {done.source}, {len(tensors)} tensors")
    print(f"{args.output}: {args.to}, {len(done.tensors)} tensors, {numbers / 1e6:.2f} M parameters")
    if args.to in ("timm", "classifier") and not any(name.startswith("head.") for name in done.tensors):
        print("no classification head: load it with timm's --pretrained-path, not with --initial-checkpoint")
    if into is not None:
        print(
            f"replaced: {done.filled}; as in {args.into}: {len(into) - done.filled} (without optimizer and iteration)"
        )
    if "pixel_std" in metadata:
        print(f"preprocessing: {metadata['input_format']} with std {metadata['pixel_std']}, saved as metadata")
        if args.to == "timm" and metadata["input_format"] != "RGB":
            print("timm ignores this metadata and expects RGB")
    _print_tensors(f"left out, without a place in form {args.to}", done.left_out)
    _print_tensors("not in the input, unchanged", {name: done.tensors[name] for name in done.unfilled})


def _read(file: str, allow_pickle: bool) -> LoadedCheckpoint:
    loaded = read_weights(file, allow_pickle=allow_pickle)
    if loaded.checkpoint.get("__author__") == "Caffe2":
        raise CheckpointError(
            f"{file} has Caffe2's names, which cannot be converted. Fix: set MODEL.WEIGHTS to the file."
        )
    return loaded


def _metadata(checkpoint: Mapping[str, Any], source: str) -> dict[str, str]:
    """Return the classes, the preprocessing and the layout of relative position tables, if the checkpoint tells."""
    saved = checkpoint.get("metadata") or {}
    layout = {key: str(saved[key]) for key in ("block_size", "halo_size", "classes") if key in saved}
    head = source == "classifier" and any(name.endswith("head.linear.weight") for name in checkpoint["model"])
    preprocessing = preprocessing_of(checkpoint, "", {"head.linear.weight"} if head else set())
    return layout | (preprocessing.metadata() if preprocessing else {})


def _print_tensors(title: str, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        print(f"{title}: {len(tensors)}")
    for name, tensor in tensors.items():
        print(f"  {name} {tuple(tensor.shape)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, metavar="FILE", help="checkpoint, or URL such as timm://NAME")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, .safetensors or .pth")
    parser.add_argument(
        "--to", required=True, choices=FORMS, help="form to write; timm and classifier have the same names"
    )
    parser.add_argument("--into", metavar="FILE", help="checkpoint of a detector whose backbone is replaced")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="run code that pickle files hold; only for files that you trust"
    )
    args = parser.parse_args(argv)
    try:
        run(args)
    except HalodetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
