"""Report of what a checkpoint loaded into a model, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from halodet.checkpoint.io import summarize
from halodet.checkpoint.matching import Match
from halodet.checkpoint.model_spec import group_of

from tabulate import tabulate


@dataclass(frozen=True)
class LoadReport:
    """What one file loaded into one model; ``str`` gives a table.

    Args:
        file: path or URL of the checkpoint.
        match: the matched tensors.
    """

    file: str
    match: Match

    @property
    def share(self) -> float:
        """Loaded share of the parameters that a file of this kind should provide, 0 to 1."""
        return self._share(self.match.expected)

    @property
    def tensor_share(self) -> float:
        """Loaded share of the tensors that a file of this kind should provide, 0 to 1; it includes norm statistics."""
        expected = self.match.expected
        return sum(name in self.match.sources for name in expected) / len(expected) if expected else 0.0

    @property
    def backbone_share(self) -> float:
        """Loaded share of the backbone's parameters, 0 to 1."""
        return self._share([name for name in self.match.spec.shapes if name.startswith(self.match.spec.backbone)])

    @property
    def model_share(self) -> float:
        """Loaded share of the model's parameters, 0 to 1."""
        return self._share(self.match.spec.shapes)

    @property
    def part(self) -> str:
        """What the file should provide, ``"model"`` or ``"backbone"``."""
        return "model" if self.match.whole or not self.match.spec.detector else "backbone"

    def _share(self, names: Iterable[str]) -> float:
        sizes = {name: math.prod(self.match.spec.shapes[name]) for name in names}
        total = sum(sizes.values())
        return sum(size for name, size in sizes.items() if name in self.match.sources) / total if total else 0.0

    def rows(self) -> list[tuple[str, int, int, int, int, int, float]]:
        """Return by group of modules: name, number of tensors, loaded, resized, missing, mismatched, loaded share."""
        sources, groups = self.match.sources, {}
        for name in self.match.spec.shapes:
            groups.setdefault(group_of(name, self.match.spec.backbone), []).append(name)
        rows = []
        for group, names in (*groups.items(), ("all", list(self.match.spec.shapes))):
            loaded, mismatched = (sum(name in found for name in names) for found in (sources, self.match.mismatched))
            resized = sum(name in sources and sources[name].resized for name in names)
            missing = len(names) - loaded - mismatched
            rows.append((group, len(names), loaded - resized, resized, missing, mismatched, self._share(names)))
        return rows

    def __str__(self) -> str:
        found = self.match
        headers = ["module", "tensors", "loaded", "resized", "missing", "shape mismatch", "parameters loaded"]
        rows = [(*row[:-1], percent(row[-1])) for row in self.rows()]
        lines = [
            f"Loaded {self.file} (key mapping: {found.key_mapping})",
            tabulate(rows, headers, stralign="right", colalign=["left"]),
            f"Loaded {percent(self.share)} of the expected parameters ({len(found.expected)} tensors of the "
            f"{self.part}), {percent(self.backbone_share)} of the backbone, {percent(self.model_share)} of the model",
        ]
        shapes = [f"{name} {old} in the file, {new} in the model" for name, (old, new) in found.mismatched.items()]
        titles = {"Shape mismatch": shapes, "Unexpected": found.unexpected, "Unused by a detector": found.unused}
        lines += [f"{title}: {len(names)} tensors, {summarize(names)}" for title, names in titles.items() if names]
        return "\n".join([*lines, *(f"Note: {note}" for note in found.notes)])


def percent(share: float) -> str:
    """Format a share, rounded down so that 100 % means all."""
    return f"{math.floor(share * 1000) / 10:.1f} %"
