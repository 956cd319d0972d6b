"""GPU time of every kernel with every tiling, on feature maps of an 800×1333 image at strides 8, 16 and 32."""

from __future__ import annotations

from functools import partial
from typing import Any

from halodet.attention.triton_ops import halo_attention_triton
from halodet.benchmark.gpu_check.cases import SMALL, AttentionCase, attend
from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context, Skipped
from halodet.benchmark.gpu_check.tilings import Launch, describe, record_launches

SIZES = {8: (100, 168, 16), 16: (50, 84, 32), 32: (25, 42, 64)}  # stride -> height, width, channels per head


def timing_cases() -> list[AttentionCase]:
    """Return the cases of 8 images."""
    return [
        AttentionCase(8, 3, "bfloat16", False, batch=8, heads=8, depth=d, value_depth=d, height=h, width=w)
        for h, w, d in SIZES.values()
    ]


def items(context: Context) -> Items:
    for case in [SMALL] if context.dry_run else timing_cases():
        inputs = case.make_inputs(context.device)
        # The backward needs the results of the forward.
        run = partial(attend, halo_attention_triton, inputs, case.layout(), case.dtype)
        for launch in record_launches(run, execute=True):
            for tiling in launch.tilings():
                yield f"{launch.name} {describe(tiling)} | {case}", partial(measure, launch, tiling, context)


def measure(launch: Launch, tiling: Any, context: Context) -> dict[str, Any]:
    """Return the median time of a launch in milliseconds."""
    if not launch.fits(tiling):
        raise Skipped("does not fit on this GPU")
    launch.run(tiling)  # compiles, if the step "compilation" did not
    seconds, timing = context.seconds(partial(launch.run, tiling))
    return {"worst": round(seconds * 1e3, 4), "timing": timing}
