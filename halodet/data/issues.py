"""Issues of the entries of a dataset, and their collection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Issue:
    """A problem of one entry of a dataset, and the action taken; ``str()`` gives one line.

    Attributes:
        file: name of the json.
        where: the entry, such as ``"image 3"``.
        reason: the problem.
        action: what is done with the entry.
        image_id: image of an annotation; None if there is none.
    """

    file: str
    where: str
    reason: str
    action: str
    image_id: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.reason}; {self.action}"


class IssueLog:
    """Issues and notes of one json, in the order in which they are found.

    Args:
        json_file: the json.

    Attributes:
        image_id: image of the annotation that is validated, for its issues.
    """

    def __init__(self, json_file: Path) -> None:
        self.file = json_file.name
        self.image_id: int | None = None
        self.issues: list[Issue] = []
        self.notes: list[str] = []
        self._counted: dict[tuple[str, str], list[str]] = {}  # places of each kind of issue that has one line

    def report(self, where: str, reason: str, action: str) -> None:
        """Add an issue."""
        self.issues.append(Issue(self.file, where, reason, action, self.image_id))

    def count(self, where: str, reason: str, action: str) -> None:
        """Add an issue to all others of the same kind, which :meth:`report_counted` reports in one line."""
        self._counted.setdefault((reason, action), []).append(where)

    def report_counted(self, kind: str, total: int) -> None:
        """Report each counted kind of issue in one line: an exporter makes a mistake in all entries or in none.

        Args:
            kind: what was counted, such as ``"annotations"``.
            total: number of entries.
        """
        for (reason, action), places in self._counted.items():
            self.report(kind, f"{len(places)} of {total} {reason}, the first is {places[0]}", action)
        self._counted.clear()

    def note(self, text: str) -> None:
        """Add a remark on something that is no mistake."""
        self.notes.append(f"{self.file}: {text}")

    def first(self, start: int = 0) -> str:
        """Return the first issue from index ``start`` on, or the first one of all."""
        if not self.issues:
            return "no issue"
        issue = self.issues[start] if start < len(self.issues) else self.issues[0]
        return f"first issue: {issue.where}: {issue.reason}"
