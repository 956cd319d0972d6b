"""The comparison of all mixers: counts, forms that are skipped, the table."""

from halodet.benchmark import lower_bounds, operators
from halodet.benchmark.attention import MODES
from halodet.benchmark.lower_bounds import LOWER_BOUNDS
from halodet.benchmark.operators import (
    BOUND,
    CONV,
    FORMS,
    HALODET,
    PLAIN,
    OperatorCase,
    describe,
    largest_tensor,
    measure_operator,
    multiply_adds,
    operator_cases,
    operator_names,
    operator_table,
    select_forms,
)
from halodet.benchmark.plain_operators import PLAIN_OPERATORS
from halodet.mixers import MIXERS, MixerSpec, build_mixer

import pytest
import torch

CPU = torch.device("cpu")
C, N = 64, 16 * 24


def case(name, channels=C, height=16, width=24):
    return OperatorCase(name, 1, channels, height, width)


def test_every_mixer_has_a_straightforward_form_and_a_lower_bound():
    assert set(PLAIN_OPERATORS) == set(MIXERS.values())
    assert set(LOWER_BOUNDS) == set(MIXERS.values()) - {MIXERS["conv"]}
    assert {*MIXERS, "lesa-global"} == set(operator_names())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv", 9 * C**2 * N),
        ("neighborhood", 3 * C**2 * N + 2 * 49 * C * N),
        # Also products of queries with the rows of the height and of the width.
        ("halo", 3 * C**2 * N + 2 * C * N * 14**2 + 2 * C * N * 14),
        ("botnet", 3 * C**2 * N + 2 * C * N**2 + C * N * (16 + 24)),
        ("external", 9 * C**2 * N + 2 * C**2 * N + 2 * 64 * C * N),
        ("slide", 3 * C**2 * N + 2 * 81 * C * N + 2 * 9 * C * N),
        ("csa", (9 * C**2 + 8 * 81 * C + 81 * C) * N // 4),
    ],
)
def test_multiply_adds_are_those_of_the_formula(name, expected):
    assert multiply_adds(case(name)) == expected


def test_counts_need_no_memory():
    assert multiply_adds(case("botnet", 128, 100, 168)) == pytest.approx(73e9, rel=0.02)
    assert largest_tensor(PLAIN, case("botnet", 128, 100, 168), torch.float32) == 8 * 16800**2 * 4
    assert describe(case("conv")) == {"parameters": 9 * C**2, "multiply_adds": 9 * C**2 * N}


def test_forms_that_need_too_much_memory_are_skipped(monkeypatch):
    limit = largest_tensor(PLAIN, case("elsa"), torch.float32) - 1
    monkeypatch.setattr(operators, "MAX_TENSOR_BYTES", limit)
    forms, skipped = select_forms(case("elsa"), torch.float32)
    assert forms == [HALODET, BOUND, CONV] and "GiB" in skipped[PLAIN]
    monkeypatch.setattr(operators, "MAX_TENSOR_BYTES", 0)
    result = measure_operator(case("elsa"), rounds=1, memory=False, device=CPU, dtype=torch.float32)
    assert result["forward"].keys() == {HALODET, PLAIN}
    table = operator_table({"elsa 1×64×16×24": result}, [case("elsa")])
    assert "elsa 1×64×16×24, forward, halodet skipped: a tensor of" in table


@pytest.mark.parametrize("name", operator_names())
def test_all_forms_run(name):
    size = case(name, 16, 6, 7)
    result = measure_operator(size, rounds=1, memory=False, device=CPU, dtype=torch.float32)
    expected = {HALODET} if name == "conv" else set(FORMS)
    for mode in MODES:
        assert result[mode].keys() == expected
        assert all(figures["ms"] > 0 and figures["ratio"] > 0 for figures in result[mode].values())
    (row,) = operator_table({str(size): result}, [size]).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == name and cells.count("") == (6 if name == "conv" else 0)


def test_the_forms_have_the_same_weights():
    layers = []
    for form in (HALODET, PLAIN):
        call = operators.build_call(form, case("elsa"), "forward", CPU, torch.float32)
        layers.append(call())
    torch.testing.assert_close(*layers, rtol=1e-4, atol=1e-5)


def test_the_bound_of_taps_covers_all_pixels(monkeypatch):
    """Of 49 taps of 16 channels: chunks of 21 of the 42 pixels are twice as many operations as one of all."""
    mixer = build_mixer("elsa", MixerSpec(16, 16, num_heads=2))
    counts = []
    for chunk in (16 * 42, 16 * 21):
        monkeypatch.setattr(lower_bounds, "CHUNK", chunk)
        bound = lower_bounds.LowerBound(torch.zeros(1, 16, 6, 7)).taps(49, 2, 8)
        bound.run()
        counts.append(len(bound.operations))
    assert counts == [49, 98]
    assert len(LOWER_BOUNDS[type(mixer)](mixer, torch.zeros(1, 16, 6, 7)).operations) >= 98


def test_cases_are_ordered_by_size():
    cases = list(operator_cases(["conv", "halo"], [1, 2], [(16, 6, 7), (32, 3, 4)]))
    assert [str(c) for c in cases[:3]] == ["conv 1×16×6×7", "halo 1×16×6×7", "conv 1×32×3×4"]
    assert len(cases) == 8 and cases[-1].batch == 2
