"""Histograms of a dataset report: HTML tables whose bars are drawn by the style sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

_SMALL, _LARGE = 32, 96  # pixels, COCO's limits of sqrt(area)
_OBJECT_EDGES = (6, 11, 18, _SMALL, 55, _LARGE, 166, 288, 499, 864)  # ratios of about sqrt(3)
_IMAGE_EDGES = (64, 128, 256, 384, 512, 640, 800, 1024, 1333, 1600, 2048, 3072, 4096, 6144, 8192)
_SINGLE_COUNTS = 12  # objects per image up to which each number has its row


def draw_object_sizes(sizes: np.ndarray) -> str:
    """Return the histogram of sqrt(area), in COCO's groups."""
    labels, counts = bin_edges(sizes, _OBJECT_EDGES, right=False)
    limits = [0, _OBJECT_EDGES.index(_SMALL) + 1, _OBJECT_EDGES.index(_LARGE) + 1, len(labels)]
    titles = (f"small, under {_SMALL}", f"medium, {_SMALL}–{_LARGE}", f"large, {_LARGE} and more")
    used = [number for number, count in enumerate(counts) if count] or [0]
    groups = []
    for title, start, end in zip(titles, limits, limits[1:], strict=False):
        rows = [(labels[n], counts[n]) for n in range(max(start, used[0]), min(end, used[-1] + 1))]
        groups.append((title, sum(counts[start:end]), rows))
    total, highest = sum(counts), max(counts)
    body = "".join(
        f'<tbody><tr class="group"><th scope="rowgroup" colspan="2">{title}</th><td>{count:,}</td>'
        f"<td>{percent(count, total)}</td></tr>{_rows(rows, total, highest)}</tbody>"
        for title, count, rows in groups
    )
    return _chart("Object sizes", ("√area in pixels", "objects"), body, describe_spread(sizes, "{:,.0f}", "pixels"))


def draw_image_sizes(sizes: list[tuple[int, int]]) -> str:
    """Return the histogram of the longer side, and the most common sizes."""
    longer = np.array([max(size) for size in sizes])
    labels, counts = bin_edges(longer, _IMAGE_EDGES, right=True)
    used = [number for number, count in enumerate(counts) if count] or [0]
    rows = [(labels[n], counts[n]) for n in range(used[0], used[-1] + 1)]
    common = Counter(sizes).most_common(4)
    text = ", ".join(f"{width} × {height} ({count:,})" for (width, height), count in common)
    more = len(set(sizes)) - len(common)
    text = f"Most common: {text}" + f" and {plural(more, 'more size')}" * bool(more)
    return draw_histogram("Image sizes", ("longer side in pixels", "images"), rows, text)


def bin_edges(values: np.ndarray, edges: Sequence[int], right: bool) -> tuple[list[str], list[int]]:
    """Return label and count of each bin; ``right``: values are integers and bins contain their upper edge."""
    counts = np.bincount(np.searchsorted(edges, values, side="left" if right else "right"), minlength=len(edges) + 1)
    lower = [edge + 1 if right else edge for edge in edges]
    first = f"up to {edges[0]}" if right else f"under {edges[0]}"
    middle = [f"{start}–{end}" for start, end in zip(lower, edges[1:], strict=False)]
    return [first, *middle, f"{lower[-1]} and more"], counts.tolist()


def count_bins(counts: np.ndarray) -> list[tuple[str, int]]:
    """Return label and number of images of each bin of objects per image: single numbers, or doubling ranges."""
    highest = int(counts.max(initial=0))
    starts = list(range(highest + 1)) if highest <= _SINGLE_COUNTS else [0, 1, 2]
    while starts[-1] <= highest and highest > _SINGLE_COUNTS:
        starts.append(2 ** (len(starts) - 2) + 1)  # 3, 5, 9, 17 ...
    if highest <= _SINGLE_COUNTS:
        starts.append(highest + 1)
    rows = []
    for start, end in zip(starts, starts[1:], strict=False):
        label = f"{start}" if end == start + 1 else f"{start}–{end - 1}"
        rows.append((label, int(((counts >= start) & (counts < end)).sum())))
    first = next((number for number, (_, count) in enumerate(rows) if count), 0)
    return rows[first:]


def describe_spread(values: np.ndarray, form: str, unit: str) -> str:
    if not len(values):
        return ""
    low, middle, high = (form.format(value) for value in (values.min(), np.median(values), values.max()))
    return f"Median {middle}, from {low} to {high} {unit}"


def draw_histogram(title: str, heads: tuple[str, str], rows: list[tuple[str, int]], remark: str) -> str:
    total, highest = sum(count for _, count in rows), max(count for _, count in rows)
    return _chart(title, heads, f"<tbody>{_rows(rows, total, highest)}</tbody>", remark)


def _rows(rows: list[tuple[str, int]], total: int, highest: int) -> str:
    return "".join(
        f'<tr><th scope="row">{label}</th>{draw_bar(count, highest)}<td>{count:,}</td>'
        f"<td>{percent(count, total)}</td></tr>"
        for label, count in rows
    )


def _chart(title: str, heads: tuple[str, str], body: str, remark: str) -> str:
    return (
        f'<div class="chart"><table><caption>{title}</caption><thead><tr><th scope="col" colspan="2">{heads[0]}</th>'
        f'<th scope="col">{heads[1]}</th><th scope="col">share</th></tr></thead>{body}</table><p>{remark}</p></div>'
    )


def draw_bar(count: int, highest: int) -> str:
    """Return a table cell with a bar."""
    width = 100 * count / highest if highest else 0
    bar = f'<i style="width:{width:.3g}%"></i>' if count else ""
    return f'<td class="bar" aria-hidden="true">{bar}</td>'


def percent(count: int, total: int) -> str:
    share = 100 * count / total if total else 0
    return (
        "0 %" if not count else "&lt; 0.1 %" if share < 0.05 else f"{share:.1f} %" if share < 9.95 else f"{share:.0f} %"
    )


def plural(count: int, noun: str, nouns: str = "") -> str:
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
