"""What a checkpoint filled of a model, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from halodet.checkpoint.matching import Match, some
from halodet.checkpoint.model_spec import group_of

from tabulate import tabulate


@dataclass(frozen=True)
class LoadReport:
    """What one file filled of one model; its text is a table for people.

    Args:
        file: path or name of the checkpoint.
        match: whose tensor went where.
    """

    file: str
    match: Match

    @property
    def share(self) -> float:
        """Numbers filled over the numbers that a file of this kind should fill, 0 to 1."""
        return self._share(self.match.expected)

    @property
    def tensor_share(self) -> float:
        """Tensors filled over the tensors that a file of this kind should fill, 0 to 1; norms without statistics show here alone."""
        wanted = self.match.expected
        return sum(name in self.match.fills for name in wanted) / len(wanted) if wanted else 0.0

    @property
    def backbone_share(self) -> float:
        """Numbers filled over all there are in the backbone, 0 to 1."""
        return self._share([name for name in self.match.target.shapes if name.startswith(self.match.target.backbone)])

    @property
    def model_share(self) -> float:
        """Numbers filled over all there are in the model, 0 to 1."""
        return self._share(self.match.target.shapes)

    def _share(self, names: Iterable[str]) -> float:
        sizes = {name: math.prod(self.match.target.shapes[name]) for name in names}
        total = sum(sizes.values())
        return sum(size for name, size in sizes.items() if name in self.match.fills) / total if total else 0.0

    def rows(self) -> list[tuple[str, int, int, int, int, int, float]]:
        """A row for each group of modules: name, tensors, filled, resized, missing, of another shape, share of its numbers filled."""
        groups: dict[str, list[str]] = {}
        for name in self.match.target.shapes:
            groups.setdefault(group_of(name, self.match.target.backbone), []).append(name)
        return [self._row(group, names) for group, names in (groups | {"all": list(self.match.target.shapes)}).items()]

    def _row(self, group: str, names: list[str]) -> tuple[str, int, int, int, int, int, float]:
        fills, mismatched = self.match.fills, self.match.mismatched
        resized = sum(name in fills and fills[name].resized for name in names)
        filled = sum(name in fills for name in names) - resized
        wrong = sum(name in mismatched for name in names)
        return group, len(names), filled, resized, len(names) - filled - resized - wrong, wrong, self._share(names)

    def __str__(self) -> str:
        found = self.match
        headers = ["module", "tensors", "filled", "resized", "missing", "other shape", "parameters filled"]
        lines = [
            f"Weights from {self.file}, understood by {found.naming or 'no name'}:",
            tabulate(
                [(*row[:-1], percent(row[-1])) for row in self.rows()], headers, stralign="right", colalign=["left"]
            ),
            f"Filled: {percent(self.share)} of what it should fill ({len(found.expected)} tensors of the "
            f"{'model' if found.whole or not found.target.detector else 'backbone'}), {percent(self.backbone_share)} of all of the "
            f"backbone, {percent(self.model_share)} of the model.",
        ]
        shapes = [
            f"{name} {file} in the file, {model} in the model" for name, (file, model) in found.mismatched.items()
        ]
        for title, names in (
            ("Of another shape", shapes),
            ("Unexpected", found.unexpected),
            ("Not used by a detector", found.not_used),
        ):
            if names:
                lines.append(f"{title}: {len(names)} tensors, {some(names)}.")
        return "\n".join([*lines, *(f"Note: {note}." for note in found.notes)])


def percent(share: float) -> str:
    """A share as text; never rounded up, so that 100 % is all."""
    return f"{math.floor(share * 1000) / 10:.1f} %"
