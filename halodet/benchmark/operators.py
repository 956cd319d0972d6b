"""All mixers to compare: each beside its straightforward form, its lower bound and a 3x3 convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from halodet.benchmark.attention import MODES, call_layer
from halodet.benchmark.lower_bounds import LOWER_BOUNDS
from halodet.benchmark.measure import compare
from halodet.benchmark.peak_memory import peak_memory
from halodet.benchmark.plain_operators import PLAIN_OPERATORS
from halodet.benchmark.report import format_figures
from halodet.mixers import MIXERS, Mixer, MixerSpec, build_mixer

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

HALODET, PLAIN, BOUND, CONV = FORMS = ("halodet", "straightforward", "lower bound", "3×3 convolution")
# On the bound of a forward pass: the gradients of both factors of a product take as much as the product.
BOUND_FACTORS = dict(zip(MODES, (1, 3), strict=True))
MAX_TENSOR_BYTES = 2 << 30  # of a form that is run
# Name in the table -> mixer and its options, for mixers whose options select different operators.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"lesa-global": ("lesa", {"binary": "global"})}


def operator_names() -> list[str]:
    """Return the names of all registered mixers and of their variants."""
    return sorted({*MIXERS, *VARIANTS})


@dataclass(frozen=True)
class OperatorCase:
    """Operator and size of its input; the layer has as many output as input channels and stride 1."""

    operator: str
    batch: int
    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.operator} {self.size}"

    @property
    def size(self) -> str:
        return f"{self.batch}×{self.channels}×{self.height}×{self.width}"

    def input(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return random numbers (B, C, H, W), the same ones in every call."""
        size = (self.batch, self.channels, self.height, self.width)
        if torch.device(device).type == "meta":
            return torch.empty(size, device=device, dtype=dtype)
        return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


class _Form(nn.Module):
    """A function of a mixer and a map, as a layer."""

    def __init__(self, mixer: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mixer, self.function = mixer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.mixer, x)


def build_form(form: str, case: OperatorCase) -> nn.Module:
    """Build the layer of a form; ``form`` is one of :data:`FORMS` other than the lower bound.

    Raises:
        ValueError: there is no operator of this name.
        KeyError: the operator has no straightforward form.
    """
    mixer = _build_mixer("conv" if form == CONV else case.operator, case.channels)
    return _Form(mixer, PLAIN_OPERATORS[type(mixer)]) if form == PLAIN else mixer


def _build_mixer(operator: str, channels: int) -> Mixer:
    name, options = VARIANTS.get(operator, (operator, {}))
    return build_mixer(name, MixerSpec(channels, channels, options=options))


def build_call(
    form: str, case: OperatorCase, mode: str, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Return a call that runs a form once; picklable arguments only.

    Args:
        form: one of :data:`FORMS`; the lower bound is that of the forward pass in both modes.
        case: operator and input.
        mode: one of :data:`~halodet.benchmark.attention.MODES`.
        device: device of the layer.
        dtype: dtype of weights and input.
    """
    torch.manual_seed(0)
    x = case.input(device, dtype)
    if form == BOUND:
        mixer = _build_mixer(case.operator, case.channels).to(device, dtype)
        return LOWER_BOUNDS[type(mixer)](mixer, x).run
    layer = build_form(form, case).to(device, dtype)
    layer.train(mode != "forward")
    return call_layer(layer, x, torch.randn_like(x), mode)


class _LargestTensor(TorchDispatchMode):
    """Record the size in bytes of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = (x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor))
        self.largest = max(self.largest, *storages, 0)
        return result


@torch.no_grad()
def largest_tensor(form: str, case: OperatorCase, dtype: torch.dtype) -> int:
    """Return the size in bytes of the largest tensor of a forward pass, without running it."""
    with torch.device("meta"), _LargestTensor() as recorder:
        build_form(form, case).to(dtype=dtype).eval()(case.input("meta", dtype))
    return recorder.largest


@torch.no_grad()
def multiply_adds(case: OperatorCase) -> int:
    """Count the multiply-adds of the straightforward form, which are those of the definition.

    Counts matrix products and convolutions, not norms, activations or the softmax. Other forms of the same function may
    take fewer, or more where they use larger matrix products.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_form(PLAIN, case).eval()(case.input("meta"))
    return counter.get_total_flops() // 2


def describe(case: OperatorCase) -> dict[str, int | None]:
    """Return the number of parameters and multiply-adds; None for the latter without a straightforward form."""
    mixer = _build_mixer(case.operator, case.channels)
    counted = type(mixer) in PLAIN_OPERATORS
    return {
        "parameters": sum(p.numel() for p in mixer.parameters()),
        "multiply_adds": multiply_adds(case) if counted else None,
    }


def select_forms(case: OperatorCase, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """Return the forms to run, and the reasons for those that need too much memory."""
    mixer = type(_build_mixer(case.operator, case.channels))
    known = {HALODET: True, PLAIN: mixer in PLAIN_OPERATORS, BOUND: mixer in LOWER_BOUNDS, CONV: True}
    if case.operator == "conv":
        known = {HALODET: True}  # the convolution itself
    skipped: dict[str, str] = {}
    for form in (HALODET, PLAIN):
        if known.get(form) and (size := largest_tensor(form, case, dtype)) > MAX_TENSOR_BYTES:
            skipped[form] = f"a tensor of {size / 2**30:.1f} GiB, more than {MAX_TENSOR_BYTES >> 30} GiB"
    if HALODET in skipped:
        return [], skipped
    return [form for form in FORMS if known.get(form) and form not in skipped], skipped


def measure_operator(
    case: OperatorCase, *, rounds: int, memory: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Time all forms of an operator in turns.

    Returns:
        ``parameters``, ``multiply_adds``, and for each mode: form -> figures of
        :func:`~halodet.benchmark.measure.compare` and :func:`~halodet.benchmark.peak_memory.peak_memory`.
    """
    forms, skipped = select_forms(case, dtype)
    results: dict[str, Any] = describe(case)
    for mode in MODES:
        arguments = {form: (form, case, mode, device, dtype) for form in forms}
        builders = {form: partial(build_call, *values) for form, values in arguments.items()}
        figures = compare(builders, reference=HALODET, rounds=rounds, device=device, use_graph=True)
        for form in forms:
            if memory and mode != MODES[0] and form != BOUND and "failed" not in figures[form]:
                figures[form] |= peak_memory(build_call, *arguments[form], device=device)
        results[mode] = figures | {form: {"skipped": reason} for form, reason in skipped.items()}
    return results


def failed_with_halodet(result: dict[str, Any]) -> bool:
    """Return whether a mixer itself failed in a result of :func:`measure_operator`."""
    return any("failed" in result[mode][HALODET] for mode in MODES)


def operator_cases(
    names: Sequence[str], batches: Sequence[int], maps: Sequence[tuple[int, int, int]]
) -> Iterator[OperatorCase]:
    """Yield all combinations, ordered by size."""
    return (OperatorCase(name, batch, *size) for batch in batches for size in maps for name in names)


def operator_table(results: dict[str, dict[str, Any]], cases: Sequence[OperatorCase]) -> str:
    """Format one row per case, and the errors.

    Args:
        results: case -> result of :func:`measure_operator`.
        cases: the cases, in order.
    """
    headers = ["operator", "B×C×H×W", "parameters", "multiply-adds"]
    for mode in MODES:
        headers += [mode, f"{PLAIN} / {HALODET}", f"{HALODET} / {BOUND}", f"{HALODET} / {CONV}"]
    rows = []
    for case in cases:
        result = results[str(case)]
        adds = result["multiply_adds"]
        row = [case.operator, case.size, f"{result['parameters'] / 1e3:.0f} k"]
        row.append("" if adds is None else f"{adds / 1e9:.2f} G")
        for mode in MODES:
            figures = result[mode]
            own = {name: value for name, value in figures[HALODET].items() if name != "ratio"}
            row += [format_figures(own), _ratio(figures, PLAIN), _inverse(figures, BOUND, BOUND_FACTORS[mode])]
            row.append(_inverse(figures, CONV))
        rows.append(row)
    errors = [f"{case}, {mode}, {form} {kind}: {figures[kind]}" for case in cases for mode in MODES
              for form, figures in results[str(case)][mode].items() for kind in ("failed", "skipped") if kind in figures
    ]  # fmt: skip
    return "\n\n".join([tabulate(rows, headers, tablefmt="github", disable_numparse=True), *errors])


def _ratio(figures: dict[str, dict[str, Any]], form: str) -> str:
    ratio = figures.get(form, {}).get("ratio")
    return "" if ratio is None else f"{ratio:.2f}"


def _inverse(figures: dict[str, dict[str, Any]], form: str, factor: float = 1.0) -> str:
    ratio = figures.get(form, {}).get("ratio")
    return "" if ratio is None else f"{1 / (ratio * factor):.2f}"
