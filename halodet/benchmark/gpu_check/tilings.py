"""Kernels, their launches and tilings, whatever their names and arguments are."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple


def kernels_module() -> Any:
    """Import the kernels; Triton is optional."""
    return importlib.import_module("halodet.attention.triton_kernels")


def find_kernels() -> dict[str, Any]:
    """Return the kernels that are launched, by name."""
    from triton.runtime.jit import KernelInterface

    found = vars(kernels_module()).items()
    return {name: x for name, x in found if isinstance(x, KernelInterface) and not name.startswith("_")}


def find_tiled_kernels() -> dict[str, Any]:
    """Return the kernels that are autotuned, by name."""
    from triton.runtime.autotuner import Autotuner

    return {name: kernel for name, kernel in find_kernels().items() if isinstance(kernel, Autotuner)}


class Launch(NamedTuple):
    """Arguments of one launch of a kernel."""

    name: str
    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def tilings(self) -> list[Any]:
        """Return the tilings that the autotuner may choose, or [None] if the kernel is not autotuned.

        The interpreter knows one tiling; a second one is added for dry runs.
        """
        if not hasattr(self.kernel, "prune_configs"):
            return [None]
        module = kernels_module()
        if not module.INTERPRETED:
            return module.sized_tilings(self.kernel.configs, self.constants["QUERIES"])
        found = list(self.kernel.configs)
        if len(found) == 1 and found[0].kwargs.get("BLOCK_M") == 32:
            found.append(type(found[0])({**found[0].kwargs, "BLOCK_M": 16}, num_warps=found[0].num_warps))
        return found

    def run(self, tiling: Any) -> None:
        """Launch the kernel again with a tiling."""
        with pinned({} if tiling is None else {self.name: tiling}):
            self.kernel[self.grid](*self.arguments, **self.constants)

    def fits(self, tiling: Any) -> bool:
        """Return whether the GPU has the resources for a tiling; the autotuner drops those that do not fit."""
        from triton.runtime.errors import OutOfResources

        if getattr(kernels_module(), "INTERPRETED", False):
            return True
        try:
            load(self.compile(tiling))
        except OutOfResources:
            return False
        except Exception:
            return True  # other errors are those of the item that runs it
        return True

    def compile(self, tiling: Any) -> Any:
        """Compile the kernel for these arguments without a launch."""
        if tiling is None:
            return self.kernel.warmup(*self.arguments, grid=(1,), **self.constants)
        return self.kernel.fn.warmup(*self.arguments, grid=(1,), **self.constants, **tiling.all_kwargs())


def load(kernel: Any) -> None:
    """Load a compiled kernel; raises Triton's OutOfResources where it exceeds those of the GPU."""
    getattr(kernel, "_init_handles", lambda: kernel.run)()


class _Recorder:
    """Kernel that records its launches."""

    def __init__(self, name: str, kernel: Any, launches: list[Launch], execute: bool) -> None:
        self.name, self.kernel, self.launches, self.execute = name, kernel, launches, execute

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.launches.append(Launch(self.name, self.kernel, grid, arguments, constants))
            return self.kernel[grid](*arguments, **constants) if self.execute else None

        return launch


def record_launches(call: Callable[[], object], execute: bool = False) -> list[Launch]:
    """Return the launches of a call; without ``execute`` the kernels do not run and results are undefined."""
    module, kernels = kernels_module(), find_kernels()
    launches: list[Launch] = []
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(name, kernel, launches, execute))
        call()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def tilings_by_kernel(call: Callable[[], object]) -> dict[str, list[Any]]:
    """Return the tilings of each autotuned kernel that a call launches, without those that do not fit on the GPU."""
    found = {}
    for launch in record_launches(call):
        if launch.tilings() != [None]:
            found[launch.name] = [tiling for tiling in launch.tilings() if launch.fits(tiling)]
            if not found[launch.name]:
                raise RuntimeError(f"no tiling of {launch.name} fits on this GPU")
    return found


def combine_tilings(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Return as few choices of one tiling per kernel as cover all tilings."""
    tilings = tilings_by_kernel(call)
    count = max(map(len, tilings.values()))
    return [{name: found[i % len(found)] for name, found in tilings.items()} for i in range(count)]


def describe(tiling: Any) -> str:
    """Return a tiling in one line."""
    if tiling is None:
        return "fixed"
    sizes = [f"{name}={value}" for name, value in tiling.kwargs.items()]
    return " ".join([*sizes, f"warps={tiling.num_warps}", f"stages={tiling.num_stages}"])


@contextmanager
def pinned(tilings: Mapping[str, Any]) -> Iterator[Counter[str]]:
    """Run each kernel named with one tiling only; yields the number of its launches that did not raise."""
    kernels = find_tiled_kernels()
    counts: Counter[str] = Counter()
    before = {name: (kernels[name].configs, dict(kernels[name].cache)) for name in tilings}
    for name, tiling in tilings.items():
        kernel = kernels[name]
        kernel.configs = [tiling]
        kernel.cache.clear()
        kernel.run = _counted(name, type(kernel).run.__get__(kernel), counts)
    try:
        yield counts
    finally:
        for name, (configs, cache) in before.items():
            kernel = kernels[name]
            del kernel.run
            kernel.configs = configs
            kernel.cache.clear()
            kernel.cache.update(cache)


def _counted(name: str, run: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    def counting(*arguments: Any, **options: Any) -> Any:
        result = run(*arguments, **options)
        counts[name] += 1
        return result

    return counting


def limit_tilings(count: int = 1) -> None:
    """Let the autotuners measure ``count`` tilings at most: fewer kernels to compile."""
    kernels_module().MAX_MEASURED = count
