"""Interleaved timing, failures and peak memory."""

from halodet.benchmark import measure
from halodet.benchmark.peak_memory import peak_memory
from halodet.benchmark.report import format_figures

import pytest
import torch

CPU = torch.device("cpu")


def test_calls_run_in_turns():
    order, rounds = [], []
    builders = {name: lambda name=name: lambda: order.append(name) for name in "ab"}
    results = measure.compare(builders, reference="a", rounds=3, device=CPU, warmup=1, on_round=rounds.append)
    assert "".join(order) == "ab" * 4 and rounds == [0, 1, 2, 3]
    assert results["a"]["ratio"] == 1 and results["b"]["ratio"] > 0 and results["b"]["ms"] > 0


def test_failures_are_results_of_their_implementation_only():
    calls = []

    def late():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError

    def early():
        raise ImportError("No module named 'elsewhere'\nand more")

    builders = {"late": lambda: late, "early": early, "good": lambda: lambda: None}
    results = measure.compare(builders, reference="late", rounds=4, device=CPU)
    assert results["late"] == {"failed": "MemoryError"}
    assert results["early"] == {"failed": "No module named 'elsewhere'"}
    assert results["good"].keys() == {"ms"} and len(calls) == 3


def test_ratio_and_mean():
    assert measure.median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 2.0]) == 2.0
    assert measure.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_times_of_different_kinds_have_no_ratio(monkeypatch):
    """As on a GPU, where one call cannot be captured in a graph."""
    notes = {
        "a": {"timing": "graph"},
        "b": {"timing": "events", "not_captured": "synchronizes"},
        "c": {"timing": "graph"},
    }
    monkeypatch.setattr(measure, "_make_timer", lambda call, device, use_graph: (lambda: 1.0, notes[call]))
    builders = {name: lambda name=name: name for name in notes}
    results = measure.compare(builders, reference="a", rounds=1, device=CPU, use_graph=True)
    assert results["a"]["ratio"] == results["c"]["ratio"] == 1 and "ratio" not in results["b"]
    assert "launch overhead" in format_figures(results["b"]) and "launch overhead" not in format_figures(results["c"])


def allocate(mebibytes):
    return lambda: torch.ones(mebibytes << 18)


def fail():
    raise ValueError("out of luck")


def test_peak_memory_of_a_call():
    result = peak_memory(allocate, 64, device=CPU)
    if not result:
        pytest.skip("this system does not report the peak memory of a process")
    assert 60 < result["peak_mib"] < 90
    assert "ended with exit code 1" in peak_memory(fail, device=CPU)["failed"]
