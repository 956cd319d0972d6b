#!/usr/bin/env python3
"""Draw which pixels of a feature map each mixer's output depends on.

    python tools/draw_operators.py                          # one image for each mixer in docs/operators
    python tools/draw_operators.py halo elsa --output /tmp

For one pixel (outlined), the color of each pixel is the size of the derivative of its output, averaged over random
inputs and weights, on a logarithmic scale over four powers of ten; white pixels have none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halodet.mixers import MIXERS, MixerSpec, build_mixer

import matplotlib
import torch
from torch import Tensor

SIDE, PIXEL = 24, (10, 13)
OPTIONS = {"blockwise": {"block_size": 8, "halo_size": 4}}  # the defaults would cover the map


def influence(name: str, *, side: int = SIDE, pixel: tuple[int, int] = PIXEL, samples: int = 16) -> Tensor:
    """Return the size of the derivative of the output at ``pixel`` by each pixel, (side, side), at most 1."""
    total = torch.zeros(side, side, dtype=torch.float64)
    for seed in range(samples):
        torch.manual_seed(seed)
        spec = MixerSpec(16, 16, num_heads=4, block_size=8, halo_size=3, options=OPTIONS.get(name, {}))
        mixer = build_mixer(name, spec).double().eval()
        x = torch.randn(1, 16, side, side, dtype=torch.float64, requires_grad=True)
        out = mixer(x)[0, :, pixel[0], pixel[1]]
        (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
        total += gradient[0].abs().sum(0)
    return total / total.max()


def draw(name: str, folder: Path) -> Path:
    """Write ``folder/name.png`` and return its path."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = influence(name).clamp(min=1e-4).log10()
    figure, axes = plt.subplots(figsize=(1.9, 1.9), layout="constrained")
    axes.imshow(values, cmap="Blues", vmin=-4, vmax=0)
    row, column = PIXEL
    axes.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=1.5))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(name, fontsize=9)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixers", nargs="*", metavar="MIXER", help="names of mixers (default: all)")
    parser.add_argument("--output", type=Path, default=Path("docs/operators"), help="folder (default: docs/operators)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.mixers if name not in MIXERS]
    if unknown:
        parser.error(f"argument MIXER: {unknown[0]!r} is invalid: expected one of {', '.join(sorted(MIXERS))}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.mixers or sorted(MIXERS):
        print(draw(name, args.output))


if __name__ == "__main__":
    main()
