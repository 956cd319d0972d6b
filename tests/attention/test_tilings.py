"""The kernels compiled for a GPU that is not there: which tilings are chosen and launched.

A stand-in for the driver names the GPU's limits and counts launches; compiling needs no GPU.
"""

import importlib.util
import json

import pytest
from helpers import ROOT, run_python

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

SCRIPT = """
import contextlib, json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

limit, spilled, measured, launched = 0, 0, 0, []

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": limit}
    def load_binary(self, name, *rest):
        return 0, 0, 100, spilled, 1024

class Launcher:
    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata
    def __call__(self, *arguments, **options):
        launched.append([self.source.name, arguments[0], self.metadata.shared])

def bench(run, quantiles=None):
    global measured
    measured += 1
    return [1.0, 1.0, 1.0]

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_benchmarker(self): return bench

driver.set_active(Driver())
torch.cuda.device_of = lambda x: contextlib.nullcontext()

from halodet.attention import triton_ops
from halodet.attention.layout import BlockLayout

layout = BlockLayout(24, 24, 8, 3, 3, 3, 3, 1, True, 0.25)
q, k, v = (torch.zeros(1, 24, 24, 2, 16, dtype=torch.bfloat16).permute(0, 3, 4, 1, 2) for _ in range(3))
table = torch.zeros(42, 16, dtype=torch.bfloat16)
kernels = triton_ops._kernels()
results = {}
for name, limit, spilled, tiles in (
    ("rule", 232448, 0, 1000), ("measured", 232448, 0, 1), ("small", 14000, 0, 1000), ("spilling", 232448, 200, 1000),
    ("none", 3000, 0, 1000),
):
    triton_ops.TUNED_TILES, measured = tiles, 0
    launched.clear()
    for kernel in (kernels.forward, kernels.backward_queries, kernels.backward_keys):
        kernel.cache.clear()
        function = kernel.fn
        while not hasattr(function, "device_caches"):
            function = function.fn
        function.device_caches.clear()
    out, lse = triton_ops._attend_fake(q, k, v)
    error = ""
    try:
        triton_ops._launch_forward(q, k, v, table, None, None, layout, out, lse)
        triton_ops._launch_backward(out, out, lse, q, k, v, table, None, None, layout)
    except RuntimeError as failure:
        error = str(failure)
    chosen = [[str(c) for c in kernel.cache.values()] for kernel in (kernels.forward, kernels.backward_queries)]
    results[name] = {"launched": list(launched), "measured": measured, "chosen": chosen, "error": error}
preferred = [str(kernel.configs[0]) for kernel in (kernels.forward, kernels.backward_queries)]
print("RESULT", json.dumps({"preferred": preferred, **results}))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    script = cache / "script.py"  # the compiler reads the source of the kernels, not of the script
    script.write_text(SCRIPT)
    done = run_python(script, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.partition("RESULT ")[2])


def test_small_maps_take_the_preferred_tiling_without_measuring(results):
    rule = results["rule"]
    assert [name for name, *_ in rule["launched"]] == ["forward", "backward_queries", "backward_keys"]
    assert rule["measured"] == 0 and [configs[0] for configs in rule["chosen"]] == results["preferred"]
    # 9 blocks of 64 queries and 2 heads, in tiles of 64 and of 32 queries; 16 rectangles of 8 x 8 keys and 2 heads.
    assert [grid for _, grid, _ in rule["launched"]] == [18, 36, 32]


def test_at_most_four_tilings_are_measured(results):
    assert 6 <= results["measured"]["measured"] <= 12 and not results["measured"]["error"]


def test_tilings_beyond_the_shared_memory_are_not_chosen(results):
    small = results["small"]
    assert not small["error"] and all(shared <= 14000 for *_, shared in small["launched"])
    assert [configs[0] for configs in small["chosen"]] != results["preferred"]
    assert "3000" in results["none"]["error"] and results["none"]["launched"] == []


def test_a_tiling_that_spills_is_chosen_where_all_do(results):
    assert len(results["spilling"]["launched"]) == 3
