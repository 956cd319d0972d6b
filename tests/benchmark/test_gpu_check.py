"""The GPU check: wrong kernels, crashes and timeouts are recorded, and what follows runs."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time

from halodet.benchmark.gpu_check import (
    cases,
    child,
    compile_worker,
    correctness,
    equal_bits,
    execution,
    kernel_timing,
    main,
    runner,
    sanitizer,
    tilings,
)
from halodet.benchmark.gpu_check.context import Context, Skipped
from halodet.benchmark.gpu_check.steps import STEPS, TIME_LIMIT, find_step
from halodet.benchmark.gpu_check.summary import format_summary

import pytest
import torch
from helpers import ROOT

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check runs the check itself"),
]
pytest.importorskip("triton")
CASE = cases.SMALL


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(correctness, "correctness_cases", lambda dry_run: [CASE])


@pytest.fixture
def in_process(monkeypatch):
    """Run the processes of the steps in this process, where the kernels may be patched."""

    def run_command(command, log, timeout, environment):
        log.touch()
        return child.main(command[3:])

    monkeypatch.setattr(runner, "run_command", run_command)


def run_step(name, output, seconds=100):
    """Run a step in this process; return its exit code and items."""
    code = child.main([name, "--output", str(output), "--seconds", str(seconds), "--dry-run"])
    return code, child.read_report(output, name)["items"]


def test_budgets_and_modules():
    assert sum(step.budget for step in STEPS) <= TIME_LIMIT
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert callable(importlib.import_module(f"halodet.benchmark.gpu_check.{step.module}").items)


def test_later_steps_run_kernels_that_are_compiled_and_checked():
    def constants(case):
        return dataclasses.replace(case, batch=1, heads=1, height=0, width=0)

    checked = set(map(constants, cases.correctness_cases(dry_run=False)))
    later = [*equal_bits.CASES, execution.NORMAL, execution.LARGE, sanitizer.CASE, *kernel_timing.timing_cases()]
    assert set(map(constants, later)) <= checked


def test_unused_time_goes_to_later_steps():
    first, second = STEPS[:2]
    assert main.step_limit(first, first.budget, 0) == first.budget
    assert main.step_limit(second, first.budget + second.budget, 1) == first.budget + second.budget - 1
    assert main.step_limit(second, TIME_LIMIT + 100, TIME_LIMIT) == 1


def test_every_tiling_is_checked(one_case, tmp_path):
    code, items = run_step("correctness", tmp_path)
    assert code == 0 and all(item["status"] == "passed" and 0 < item["worst"] <= 1 for item in items.values())
    for kernel in ("forward", "backward_queries", "backward_keys"):
        assert len([name for name in items if name.startswith(f"{kernel} ")]) == 2
    assert tilings.find_tiled_kernels()["forward"].configs != []


def test_wrong_results_fail_and_the_next_step_runs(one_case, in_process, monkeypatch, tmp_path, capsys):
    blocked = correctness.halo_attention_blocked
    monkeypatch.setattr(correctness, "halo_attention_blocked", lambda *arguments: blocked(*arguments) * 1.001)
    assert main.main(["--dry-run", "--step", "correctness", "memory", "--output", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    wrong, following = result["steps"]
    assert wrong["status"] == "failed" and wrong["counts"] == {"failed": 6} and wrong["worst"] > 1
    assert following["status"] == "passed" and following["name"] == "memory"
    table = (tmp_path / "gpu_check.md").read_text()
    assert "times the limit" in table and table in capsys.readouterr().out


def test_a_tiling_that_raises_fails_alone(one_case, monkeypatch, tmp_path):
    kernel = tilings.find_tiled_kernels()["backward_keys"]
    (good,) = kernel.configs
    bad = type(good)({**good.kwargs, "BLOCK_M": 24}, num_warps=good.num_warps)  # not a power of two
    monkeypatch.setattr(kernel, "configs", [good, bad])
    code, items = run_step("correctness", tmp_path)
    assert code == 1
    for name, item in items.items():
        assert item["status"] == ("failed" if "backward_keys" in name and "BLOCK_M=24" in name else "passed"), name


def test_results_of_another_backend_fail(one_case, monkeypatch, tmp_path):
    attempts = []

    def falls_back(*arguments):
        attempts.append(1)
        triton = correctness_triton if len(attempts) == 1 else correctness.halo_attention_blocked
        return triton(*arguments)

    correctness_triton = correctness.halo_attention_triton
    monkeypatch.setattr(correctness, "halo_attention_triton", falls_back)
    code, items = run_step("correctness", tmp_path)
    assert code == 1 and all("another backend" in item["failed"] for item in items.values())


def test_elements_that_are_not_written_are_not_finite():
    with cases.poisoned_outputs():
        assert torch.zeros(2).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_error_of_one_element_counts():
    exact = torch.randn(100_000, dtype=torch.float64)
    plain = exact + 1e-3 * torch.randn_like(exact)
    wrong = plain.clone()
    assert correctness.relative_error(plain, plain, exact, "bfloat16") <= 1
    wrong[5] += 1
    assert correctness.relative_error(wrong, plain, exact, "bfloat16") > 1
    wrong[5] = float("nan")
    assert correctness.relative_error(wrong, plain, exact, "bfloat16") > 1e6


def test_pinned_tilings_are_those_that_run():
    inputs = CASE.make_inputs(torch.device("cpu"))

    def run():
        return cases.attend(correctness.halo_attention_triton, inputs, CASE.layout(), CASE.dtype)

    kernels = tilings.find_tiled_kernels()
    before = {name: list(kernel.configs) for name, kernel in kernels.items()}
    for chosen in tilings.combine_tilings(run):
        with tilings.pinned(chosen) as launched:
            run()
        assert launched == dict.fromkeys(chosen, 1)
        assert {name: kernels[name].best_config for name in chosen} == chosen
    assert {name: kernel.configs for name, kernel in kernels.items()} == before
    assert not any("run" in vars(kernel) for kernel in kernels.values())


def test_tilings_that_do_not_fit_are_skipped(monkeypatch):
    from triton.runtime.errors import OutOfResources

    launch = tilings.Launch("forward", None, None, (), {})

    def too_large(self, tiling):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tilings.Launch, "tilings", lambda self: ["large"])
    monkeypatch.setattr(tilings.Launch, "compile", too_large)
    monkeypatch.setattr(tilings.kernels_module(), "INTERPRETED", False)
    monkeypatch.setattr(compile_worker, "find_launches", lambda case, dry_run: [launch])
    result = compile_worker.compile_task(compile_worker.Task(CASE, 0, 0, "forward"), dry_run=True)
    assert result["status"] == "skipped" and "232448" in result["reason"]
    assert not launch.fits("large")
    monkeypatch.setattr(tilings, "record_launches", lambda call: [launch])
    with pytest.raises(RuntimeError, match="no tiling of forward fits"):
        tilings.tilings_by_kernel(None)


def make_context(output, seconds=100):
    return Context(True, output, time.monotonic() + seconds)


def test_items_fail_or_are_skipped_alone(tmp_path):
    def fail():
        raise ValueError("no\nkernel")

    def skip():
        raise Skipped("no tool")

    context = make_context(tmp_path)
    items = [("a", fail), ("b", skip), ("c", lambda: {"worst": 2}), ("d", lambda: {"failed": "wrong"})]
    assert child.run_items("memory", items, context) == 1
    report = child.read_report(tmp_path, "memory")
    assert report["finished"] and report["running"] is None
    assert [item["status"] for item in report["items"].values()] == ["failed", "skipped", "passed", "failed"]
    assert report["items"]["a"]["failed"] == "ValueError: no kernel"


def test_unusable_device_restarts_after_the_item(tmp_path):
    class Broken(Context):
        broken = False

        def synchronize(self):
            if self.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ran = []

    def corrupt():
        context.broken = True
        raise RuntimeError("illegal memory access")

    items = [("a", lambda: {}), ("b", corrupt), ("c", lambda: ran.append(1) or {})]
    context = Broken(True, tmp_path, time.monotonic() + 100)
    assert child.run_items("memory", items, context) == child.RESTART and not ran
    assert child.run_items("memory", items, make_context(tmp_path)) == 1 and ran == [1]
    statuses = {name: item["status"] for name, item in child.read_report(tmp_path, "memory")["items"].items()}
    assert statuses == {"a": "passed", "b": "failed", "c": "passed"}


def test_items_after_the_deadline_are_recorded(tmp_path):
    child.run_items("memory", [("late", lambda: {})], make_context(tmp_path, seconds=-1))
    assert child.read_report(tmp_path, "memory")["items"] == {"late": {"status": "not run"}}


CRASH = """
import os, sys, time
from halodet.benchmark.gpu_check import child, versions
def hang(): time.sleep(60)
versions.items = lambda context: [("a", dict), ("b", {}), ("c", dict)]
child.main(sys.argv[1:])
"""


@pytest.mark.parametrize("action, limit, text", [("os.abort", 60, "process ended"), ("hang", 8, "timed out")])
def test_process_that_crashes_or_hangs(action, limit, text, tmp_path, monkeypatch):
    start = runner.run_command

    def run_command(command, *arguments):
        return start([sys.executable, "-c", CRASH.replace("{}", action), *command[3:]], *arguments)

    monkeypatch.setattr(runner, "run_command", run_command)
    record = runner.run_step(find_step("versions"), tmp_path, True, limit)
    assert record["status"] == "failed" and text in record["items"]["b"]["failed"]
    assert record["items"]["a"]["status"] == "passed" and record["seconds"] < 50
    # After a crash the other items run; after a timeout there is no time.
    assert ("c" in record["items"]) == (action == "os.abort")
    assert text in format_summary({"steps": [record]})


def test_step_that_cannot_start_is_recorded(in_process, monkeypatch, tmp_path):
    def run_command(command, log, *_):
        log.write_text("Traceback\nImportError: broken\n")
        return 1

    monkeypatch.setattr(runner, "run_command", run_command)
    record = runner.run_step(find_step("memory"), tmp_path, True, 10)
    assert record["status"] == "failed" and record["exit_codes"] == [1]
    assert "ImportError: broken" in format_summary({"steps": [record]})


def test_report_after_a_kill_has_the_earlier_steps(tmp_path):
    command = [sys.executable, "tools/gpu_check.py", "--dry-run", "--step", "versions", "layer-timing"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--output", str(tmp_path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    path, deadline = tmp_path / "gpu_check.json", time.monotonic() + 100
    try:
        while time.monotonic() < deadline:
            result = json.loads(path.read_text()) if path.exists() else {}
            if result.get("running") == "layer-timing":
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    result = json.loads(path.read_text())
    assert result["running"] == "layer-timing"
    (step,) = result["steps"]
    assert step["name"] == "versions" and step["status"] == "passed"
    assert step["items"]["torch"]["value"] in torch.__version__


@pytest.mark.slow
def test_dry_run_of_all_steps(tmp_path):
    command = [sys.executable, "tools/gpu_check.py", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}  # implies --dry-run
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [step["name"] for step in result["steps"]] == [step.name for step in STEPS]
    assert {step["status"] for step in result["steps"]} == {"passed"}
    replaced = {text for step in result["steps"] for text in step["stand_ins"]}
    assert "CUDA graph: a plain call" in replaced and any("mem_get_info" in text for text in replaced)
    compiled = next(step for step in result["steps"] if step["name"] == "compilation")["items"]
    assert any(item.get("registers", 0) > 0 and item["shared_bytes"] > 0 for item in compiled.values())
