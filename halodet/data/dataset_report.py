"""Report on a validated dataset: a dict for JSON, and one HTML page for a browser."""

from __future__ import annotations

import dataclasses
import html
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import halodet
from halodet.data.annotations import is_int
from halodet.data.coco import ValidatedCoco
from halodet.data.coco_validator import SKIPPED_IN_TRAINING
from halodet.data.issues import Issue
from halodet.data.report_charts import (
    count_bins,
    describe_spread,
    draw_bar,
    draw_histogram,
    draw_image_sizes,
    draw_object_sizes,
    percent,
    plural,
)
from halodet.data.report_style import STYLE
from halodet.data.thumbnails import CROWD_COLOR, MAX_DRAWN, Color, choose_colors, draw_annotations, jpeg_data_uri
from halodet.errors import ImageError
from halodet.utils.image_io import read_image
from halodet.utils.io import atomic_write

import numpy as np

__all__ = ["ClassCounts", "count_classes", "count_usable_images", "make_report", "write_html_report"]

_NUM_WORST = 8  # images with the most issues
_NUM_SAMPLES = 12
_MAX_PLACEHOLDERS = 3  # worst images that cannot be shown
_MAX_KINDS = 30
_MAX_LINES = 200  # issues that are listed one by one
_MAX_CLASSES = 1250  # rows; LVIS has 1203 classes
_MAX_TEXT, _MAX_NAME = 240, 80  # characters
_MAX_IMAGE_ISSUES = 4  # lines below an image
_MAX_LEGEND = 6  # classes below an image


_COUNTED = re.compile(r"(\d+) of \d+ (.*), the first is (.*)", re.DOTALL)
# Quoted names, lists, objects and numbers, in which issues of one kind differ; \0 is between reason and action.
_VARIABLE = re.compile(
    r"""('(?:[^'\\\0]|\\.)*'|"(?:[^"\\\0]|\\.)*"|\[(?:[^][\0]|\[[^][\0]*\])*\]|\{[^{}\0]*\}"""
    r"""|(?<!\w)[-+]?\d(?:[\d.,]*\d)?(?:e[-+]?\d+)?)""",
    re.IGNORECASE,
)
_MAX_COMPARED = 1000  # characters


@dataclasses.dataclass(frozen=True)
class ClassCounts:
    """Counts of one class.

    Attributes:
        id: category id.
        name: category name.
        annotations: number of annotations, crowds included.
        images: number of images that contain the class.
        crowds: number of crowds.
        median_size: median of sqrt(area) in pixels, crowds aside; None without objects.
    """

    id: int
    name: str
    annotations: int
    images: int
    crowds: int
    median_size: float | None


def count_classes(dataset: dict[str, Any]) -> list[ClassCounts]:
    """Count the annotations of each class of a valid COCO dict, in the order of its categories."""
    sizes: dict[int, list[float]] = defaultdict(list)
    images: dict[int, set[int]] = defaultdict(set)
    crowds: Counter[int] = Counter()
    for annotation in dataset["annotations"]:
        key = annotation["category_id"]
        images[key].add(annotation["image_id"])
        if annotation["iscrowd"]:
            crowds[key] += 1
        else:
            sizes[key].append(annotation["area"] ** 0.5)
    return [
        ClassCounts(
            key,
            category["name"],
            len(sizes[key]) + crowds[key],
            len(images[key]),
            crowds[key],
            float(np.median(sizes[key])) if sizes[key] else None,
        )
        for category in dataset["categories"]
        for key in [category["id"]]
    ]


def count_usable_images(checked: ValidatedCoco, issues: Iterable[Issue]) -> int:
    """Return the number of images that training does not skip."""
    skipped = {issue.where for issue in issues if issue.action == SKIPPED_IN_TRAINING}
    return len(checked.dataset["images"]) - len(skipped)


def make_report(checked: ValidatedCoco, issues: Sequence[Issue], *, images_usable: int | None) -> dict[str, Any]:
    """Return the report as a dict for JSON.

    Args:
        checked: the validated dataset.
        issues: its issues, and those of reading its images.
        images_usable: number of images that can be trained on; None if reading them was interrupted.
    """
    return {
        "images_usable": images_usable,
        "images": len(checked.dataset["images"]),
        "annotations": len(checked.dataset["annotations"]),
        "classes": [dataclasses.asdict(counts) for counts in count_classes(checked.dataset)],
        "issues": [{**dataclasses.asdict(issue), "image_id": _image_of(issue)} for issue in issues],
        "notes": checked.notes,
    }


def write_html_report(
    path: str | Path,
    checked: ValidatedCoco,
    issues: Sequence[Issue],
    *,
    images_usable: int | None,
    remark: str = "",
) -> None:
    """Write the report as one HTML file of less than about 2 MB, without scripts and without links to other files.

    At most 36 images are read, the others are not.

    Args:
        path: file to write.
        checked: the validated dataset.
        issues: its issues, and those of reading its images.
        images_usable: number of images that can be trained on; None if reading them was interrupted.
        remark: sentence at the top, such as what was not checked.

    Raises:
        OSError: the file cannot be written.
    """
    page = _Page(checked, issues).render(images_usable, remark)
    atomic_write(path, lambda file: Path(file).write_text(page, encoding="utf-8"))


class _Kind:
    """Issues that differ in names and numbers only."""

    def __init__(self, parts: list[str], first: str) -> None:
        self.parts, self.first = parts, first
        self.count = self.num_issues = 0

    def add(self, parts: list[str], count: int) -> None:
        """Add an issue; the parts in which it differs become "…"."""
        self.parts = [old if old == new else "…" for old, new in zip(self.parts, parts, strict=True)]
        self.count += count
        self.num_issues += 1

    @property
    def what(self) -> str:
        return "".join(self.parts).split("\0")[0]

    @property
    def action(self) -> str:
        return "".join(self.parts).split("\0")[-1]


class _Page:
    """The HTML page of one dataset."""

    def __init__(self, checked: ValidatedCoco, issues: Sequence[Issue]) -> None:
        self.checked, self.issues, self.image_dir = checked, issues, checked.image_dir
        self.images = {image["id"]: image for image in checked.dataset["images"]}
        self.annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in checked.dataset["annotations"]:
            self.annotations[annotation["image_id"]].append(annotation)
        self.names = {category["id"]: category["name"] for category in checked.dataset["categories"]}
        self.counts = count_classes(checked.dataset)
        self.ranked = sorted(self.counts, key=lambda entry: -entry.annotations)
        self.ranks = {entry.id: rank for rank, entry in enumerate(self.ranked)}
        self.issues_of: dict[int, list[Issue]] = defaultdict(list)
        self.locate_issues()
        self.shown: set[int] = set()  # images with issues that the page shows

    def locate_issues(self) -> None:
        """Fill ``issues_of``; an issue with a count belongs to the image of its first annotation."""
        firsts: dict[str, int] = {}
        if any(_COUNTED.fullmatch(issue.reason) for issue in self.issues):
            for annotation in self.checked.dataset["annotations"]:
                firsts.setdefault(f"annotation {annotation['id']}", annotation["image_id"])
        for issue in self.issues:
            image_id, counted = _image_of(issue), _COUNTED.fullmatch(issue.reason)
            if image_id is None and issue.where == "annotations" and counted:
                image_id = firsts.get(counted[3])
            if image_id is not None:
                self.issues_of[image_id].append(issue)

    def render(self, images_usable: int | None, remark: str) -> str:
        worst, samples = self.worst_images(), self.sample_images()
        name = self.checked.json_file.name
        sections = [
            ("Issues", "What to look at first", self.issue_section()),
            ("Worst images", "Images with the most issues", worst),
            ("Samples", "Random samples", samples),
            ("Sizes", "Sizes and counts", self.histogram_section()),
            ("Classes", "Classes", self.class_section()),
        ]
        links, body = "", ""
        for short, title, content in sections:
            if content:
                key = short.split()[0].lower()
                links += f'<a href="#{key}">{short}</a>'
                body += f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>'
                body += f"{content}</section>\n"
        written = f"Written by tools/check_dataset.py of halodet {halodet.__version__}, {datetime.now():%Y-%m-%d %H:%M}"
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(name, _MAX_NAME)} – dataset report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f'<header><p class="kicker">Dataset report</p><h1>{_bdi(name, _MAX_NAME)}</h1>'
            f'<p class="paths">{_bdi(self.checked.json_file)}<br>'
            f"images in {_bdi(self.image_dir)}</p>"
            f"{self.summary(images_usable)}"
            + (f'<p class="remark">{_text(remark)}</p>' if remark else "")
            + f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}</main>\n'
            f"<footer><p>{written}</p></footer>\n</body>\n</html>\n"
        )

    def summary(self, images_usable: int | None) -> str:
        dataset = self.checked.dataset
        total = len(dataset["images"])
        if images_usable is None:
            images, detail = "–", f"of {total:,}, not all of them read"
        else:
            images, detail = f"{images_usable:,}", f"of {total:,} valid"
        objects = sum(not annotation["iscrowd"] for annotation in dataset["annotations"])
        crowds = len(dataset["annotations"]) - objects
        unused = len(self.names) - len({annotation["category_id"] for annotation in dataset["annotations"]})
        tiles = [
            ("images usable", images, detail, ""),
            ("annotations", f"{objects + crowds:,}", f"{crowds:,} of them crowds" if crowds else "no crowds", ""),
            ("classes", f"{len(self.names):,}", f"{unused:,} without annotations" if unused else "all used", ""),
            ("issues", f"{len(self.issues):,}", "see below" if self.issues else "none found", _tone(self.issues)),
        ]
        return '<dl class="tiles">' + "".join(
            f'<div class="tile {tone}"><dt>{label}</dt><dd><b>{value}</b> <span>{detail}</span></dd></div>'
            for label, value, detail, tone in tiles
        ) + "</dl>"  # fmt: skip

    def issue_section(self) -> str:
        kinds = self.kinds()
        parts = []
        if not kinds:
            parts.append('<p class="fine">No issues were found.</p>')
        else:
            lost = "those that drop data first" if _is_lost(kinds[0].action) else "none drops data"
            parts.append(
                f'<p class="lead">{plural(len(self.issues), "issue")} of {plural(len(kinds), "kind")}, {lost}. '
                "Each number counts the entries concerned.</p>"
            )
            items = "".join(
                f'<li class="kind {"lost" if _is_lost(kind.action) else "kept"}"><b class="count">{kind.count:,}</b>'
                f'<div><p class="what">{_bdi(kind.what)}</p><p class="action">{_text(kind.action)}</p>'
                + f'<p class="example">first: {_bdi(kind.first)}</p>' * (kind.count > 1)
                + "</div></li>"
                for kind in kinds[:_MAX_KINDS]
            )
            digits = max(len(f"{kind.count:,}") for kind in kinds)
            parts.append(f'<ol class="kinds" style="--digits:{digits + 1}ch">{items}</ol>')
            if len(kinds) > _MAX_KINDS:
                rest = sum(kind.count for kind in kinds[_MAX_KINDS:])
                parts.append(f'<p class="more">and {len(kinds) - _MAX_KINDS:,} more kinds with {rest:,} entries</p>')
        notes = [note.removeprefix(f"{self.checked.json_file.name}: ") for note in self.checked.notes]
        if notes:
            items = "".join(f"<li>{_bdi(note, 2 * _MAX_TEXT)}</li>" for note in notes)
            parts.append(f'<h3>Notes</h3><ul class="notes">{items}</ul>')
        if kinds:
            shown = min(len(self.issues), _MAX_LINES)
            title = f"All {shown:,} issues" if shown == len(self.issues) else f"The first {shown:,} issues"
            lines = "".join(f"<li>{_bdi(_line(issue))}</li>" for issue in self.issues[:shown])
            more = (
                ""
                if shown == len(self.issues)
                else f'<p class="more">and {len(self.issues) - shown:,} more; --report FILE.json writes all of them</p>'
            )
            parts.append(
                f'<details><summary>{title}, one by one</summary><ol class="lines">{lines}</ol>{more}</details>'
            )
        return "".join(parts)

    def kinds(self) -> list[_Kind]:
        """Return the kinds of issues: those that drop data first, then by count."""
        kinds: dict[tuple[str, ...], _Kind] = {}
        for issue in self.issues:
            counted = (
                _COUNTED.fullmatch(issue.reason) if issue.where in ("images", "categories", "annotations") else None
            )
            reason = counted[2] if counted else self.without_path(issue)
            what = f"{issue.where}: {reason}"[:_MAX_COMPARED].replace("\0", "\ufffd")
            parts = _VARIABLE.split(f"{what}\0{issue.action}")
            kind = kinds.setdefault(tuple(parts[::2]), _Kind(parts, counted[3] if counted else _line(issue)))
            kind.add(parts, int(counted[1]) if counted else 1)
        return sorted(kinds.values(), key=lambda kind: (not _is_lost(kind.action), -kind.count))

    def without_path(self, issue: Issue) -> str:
        """Return the reason with short words for the paths in it."""
        reason, image = issue.reason, self.images.get(_image_of(issue))
        if image:
            reason = reason.replace(str(self.image_dir / image["file_name"]), "the file")
        return reason.replace(str(self.image_dir), "the folder") if len(str(self.image_dir)) > 1 else reason

    def worst_images(self) -> str:
        figures: list[str] = []
        placeholders = tries = 0
        for image_id, issues in sorted(self.issues_of.items(), key=lambda item: -len(item[1])):
            if len(figures) == _NUM_WORST or tries == 3 * _NUM_WORST:
                break
            known = image_id in self.images
            tries += known
            if not known and placeholders == _MAX_PLACEHOLDERS:
                continue
            picture, shown = self.picture(image_id)
            if not shown:
                placeholders += 1
                if placeholders > _MAX_PLACEHOLDERS:
                    continue
            self.shown.add(image_id)
            figures.append(self.figure(image_id, picture, shown, issues))
        return (
            '<p class="lead">Their valid annotations are drawn, one color for each class. Dropped annotations are '
            f"not.</p>{_gallery(figures)}"
            if figures
            else ""
        )

    def sample_images(self) -> str:
        """Show random images such that as many classes as possible appear."""
        given = [image_id for image_id in self.images if self.annotations.get(image_id)]
        good = [image_id for image_id in given if image_id not in self.issues_of]
        lead = "Images without issues, chosen" if good else "Chosen"
        good = good or [image_id for image_id in given if image_id not in self.shown]
        generator = random.Random(0)
        generator.shuffle(good)
        containing: dict[int, list[int]] = {key: [] for key in self.names}
        for image_id in reversed(good):
            for key in {annotation["category_id"] for annotation in self.annotations[image_id]}:
                containing[key].append(image_id)
        classes = [key for key in containing if containing[key]]
        generator.shuffle(classes)
        chosen: dict[int, None] = {}
        covered: set[int] = set()
        while classes and len(chosen) < _NUM_SAMPLES:
            for key in [key for key in classes if key not in covered] or classes:
                while containing[key] and containing[key][-1] in chosen:
                    containing[key].pop()
                if containing[key]:
                    image_id = containing[key].pop()
                    chosen[image_id] = None
                    covered |= {annotation["category_id"] for annotation in self.annotations[image_id]}
                    break
                classes.remove(key)
        figures = []
        for image_id in chosen:
            picture, shown = self.picture(image_id)
            figures.append(self.figure(image_id, picture, shown))
        return (
            f'<p class="lead">{lead} such that many classes appear. Check that boxes and masks cover the objects of '
            f"their class.</p>{_gallery(figures)}"
            if figures
            else ""
        )

    def picture(self, image_id: int) -> tuple[str, bool]:
        """Return the drawing of an image or a placeholder with the reason, and whether it is a drawing."""
        image = self.images.get(image_id)
        if image is None:
            where = f"image {image_id}"
            listed = any(issue.where == where for issue in self.issues_of[image_id])
            return _placeholder("image skipped" if listed else "not among the images of the json"), False
        path = self.image_dir / image["file_name"]
        try:
            pixels = read_image(path)
        except ImageError as error:
            return _placeholder(str(error).replace(str(path), "the file").rstrip(".")), False
        annotations = self.annotations[image_id]
        height, width = pixels.shape[:2]
        if (width, height) != (image["width"], image["height"]):
            annotations = []  # they would be drawn in wrong places
        drawing = draw_annotations(pixels, annotations, self.colors(image_id))
        alt = f"{image['file_name']} with {plural(len(annotations), 'annotation')} drawn"
        return (
            f'<img src="{jpeg_data_uri(drawing)}" width="{drawing.shape[1]}" height="{drawing.shape[0]}" '
            f'alt="{_attribute(alt)}">',
            True,
        )

    def figure(self, image_id: int, picture: str, shown: bool, issues: Sequence[Issue] = ()) -> str:
        """Return an image with its caption, and with ``issues`` below."""
        image = self.images.get(image_id)
        badge = f'<span class="badge {_tone(issues)}">{plural(len(issues), "issue")}</span>' if issues else ""
        lines = "".join(f"<li>{_bdi(_line(issue))}</li>" for issue in issues[:_MAX_IMAGE_ISSUES])
        if len(issues) > _MAX_IMAGE_ISSUES:
            lines += f'<li class="more">and {len(issues) - _MAX_IMAGE_ISSUES:,} more</li>'
        title = _bdi(image["file_name"], _MAX_NAME) if image else f"image {image_id}"
        parts = []
        if image:
            annotations = len(self.annotations[image_id])
            facts = f"image {image_id}, {image['width']} × {image['height']}, {plural(annotations, 'annotation')}"
            if shown and annotations > MAX_DRAWN:
                facts += f", the {MAX_DRAWN} largest drawn"
            parts = [f'<p class="facts">{facts}</p>', self.legend(image_id) if shown else ""]
        if lines:
            parts.append(f'<ul class="lines">{lines}</ul>')
        caption = f'<figcaption><p class="name">{title} {badge}</p>{"".join(parts)}</figcaption>'
        return f'<figure><div class="frame">{picture}</div>{caption}</figure>'

    def colors(self, image_id: int) -> dict[int, Color]:
        """Return the color of each class of an image."""
        objects = (annotation for annotation in self.annotations[image_id] if not annotation["iscrowd"])
        return choose_colors(self.ranks, (annotation["category_id"] for annotation in objects))

    def legend(self, image_id: int) -> str:
        """Return the colors of the classes of an image."""
        annotations = self.annotations[image_id]
        counts = Counter(annotation["category_id"] for annotation in annotations if not annotation["iscrowd"])
        crowds = sum(bool(annotation["iscrowd"]) for annotation in annotations)
        colors = self.colors(image_id)
        items = [
            f"<li>{_chip(colors[key])}{_bdi(self.names[key], 40)} <span>{count:,}</span></li>"
            for key, count in counts.most_common(_MAX_LEGEND)
        ]
        if crowds:
            items.append(f"<li>{_chip(CROWD_COLOR)}crowd <span>{crowds:,}</span></li>")
        if len(counts) > _MAX_LEGEND:
            items.append(f"<li>and {plural(len(counts) - _MAX_LEGEND, 'more class', 'more classes')}</li>")
        return f'<ul class="legend">{"".join(items)}</ul>' if items else ""

    def histogram_section(self) -> str:
        objects = [annotation for annotation in self.checked.dataset["annotations"] if not annotation["iscrowd"]]
        sizes = np.sqrt(np.array([annotation["area"] for annotation in objects], dtype=float))
        per_image = Counter(annotation["image_id"] for annotation in objects)
        counts = np.array([per_image[image_id] for image_id in self.images])
        images = self.images.values()
        tables = [
            draw_object_sizes(sizes),
            draw_histogram(
                "Objects per image",
                ("objects", "images"),
                count_bins(counts),
                describe_spread(counts, "{:.0f}", "objects"),
            ),
            draw_image_sizes([(image["width"], image["height"]) for image in images]),
        ]
        return f'<p class="lead">Crowds are not counted here.</p><div class="charts">{"".join(tables)}</div>'

    def class_section(self) -> str:
        index = {entry.id: number for number, entry in enumerate(self.counts)}
        total, highest = len(self.checked.dataset["annotations"]), self.ranked[0].annotations
        rows = "".join(
            f'<tr><th scope="row">{_bdi(entry.name, _MAX_NAME)}</th>'
            f"<td>{entry.annotations:,}</td>{draw_bar(entry.annotations, highest)}"
            f'<td class="wide">{percent(entry.annotations, total)}</td><td>{entry.images:,}</td>'
            f"<td>{entry.crowds:,}</td><td>{'–' if entry.median_size is None else f'{entry.median_size:,.0f}'}</td>"
            f'<td class="id wide">{entry.id}</td><td class="id wide">{index[entry.id]}</td></tr>\n'
            for entry in self.ranked[:_MAX_CLASSES]
        )
        more = len(self.ranked) - _MAX_CLASSES
        rest = (
            f'<p class="more">and {more:,} more classes; --report FILE.json writes all of them</p>' if more > 0 else ""
        )
        return (
            '<div class="scroll" role="region" aria-label="Classes" tabindex="0"><table class="classes">'
            "<caption>Count: annotations, crowds included. Size: median of √area in pixels, crowds aside.</caption>"
            '<thead><tr><th scope="col">class</th><th scope="col">count</th>'
            '<th class="bar" aria-hidden="true">share</th><th scope="col" class="wide" aria-label="share"></th>'
            '<th scope="col">images</th><th scope="col">crowds</th><th scope="col">size</th>'
            '<th scope="col" class="wide">id</th><th scope="col" class="wide">index</th>'
            f"</tr></thead><tbody>\n{rows}</tbody></table></div>{rest}"
        )


def _image_of(issue: Issue) -> int | None:
    """Return the id of the image that an issue names."""
    if is_int(issue.image_id):
        return issue.image_id
    named = re.search(r"(?:^| of )image (-?\d{1,16})$", issue.where)
    return int(named[1]) if named else None


def _is_lost(action: str) -> bool:
    """Return whether data is dropped."""
    return "skipped" in action or "dropped" in action


def _tone(issues: Sequence[Issue]) -> str:
    return "lost" if any(_is_lost(issue.action) for issue in issues) else "kept" if issues else "fine"


def _line(issue: Issue) -> str:
    return str(issue).removeprefix(f"{issue.file}: ")


def _gallery(figures: list[str]) -> str:
    return f'<div class="gallery">{"".join(figures)}</div>'


def _placeholder(reason: str) -> str:
    return f'<div class="placeholder"><b>no image</b> <span>{_bdi(reason)}</span></div>'


def _chip(color: Color) -> str:
    return f'<i class="chip" style="background:#{"".join(f"{part:02x}" for part in color)}"></i>'


def _shorten(value: object, limit: int) -> str:
    """Return text of at most ``limit`` characters, without control characters and surrogates."""
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join("\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)


def _text(value: object, limit: int = _MAX_TEXT) -> str:
    return html.escape(_shorten(value, limit), quote=False)


def _attribute(value: object) -> str:
    return html.escape(_shorten(value, _MAX_TEXT), quote=True)


def _bdi(value: object, limit: int = _MAX_TEXT) -> str:
    """Return text of the dataset, whose direction does not change that of the text around it."""
    return f"<bdi>{_text(value, limit)}</bdi>"
