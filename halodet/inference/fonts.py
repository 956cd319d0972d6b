"""Text in any script as masks of pixels, with the installed fonts."""

from __future__ import annotations

import functools
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["render_text"]

logger = logging.getLogger(__name__)

# The first that is installed draws a letter if it has it, else the next one does.
_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansCJKjp-Regular.otf", "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf", "wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf", "ipaexg.ttf", "NanumGothic.ttf", "msyh.ttc", "simhei.ttf", "malgun.ttf", "PingFang.ttc",
    "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf", "Arial Unicode MS.ttf",
    "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf", "unifont.ttf",
)  # fmt: skip
_NO_GLYPH = "\uffff"  # no font has it, so that its glyph is the one for missing letters
_INVISIBLE = ("Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp")


@functools.lru_cache(maxsize=512)
def render_text(text: str, size: int) -> np.ndarray:
    """Render one line of text.

    Letters that no installed font has are drawn as empty boxes, and reported once per process.

    Args:
        text: any text; control characters are drawn as spaces.
        size: font size in pixels.

    Returns:
        (H, W) uint8 opacity of the text; all texts of a size that the same fonts draw have the same height.
    """
    text = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    runs = list(_runs(text, size))
    metrics = [font.getmetrics() for font, _ in runs] or [_fonts(size)[0].getmetrics()]
    ascent, descent = (max(values) for values in zip(*metrics, strict=True))
    width = sum(font.getlength(run) for font, run in runs)
    image = Image.new("L", (max(round(width), 1), ascent + descent))
    draw, x = ImageDraw.Draw(image), 0.0
    for font, run in runs:
        draw.text((x, ascent), run, fill=255, font=font, anchor="ls")
        x += font.getlength(run)
    return np.asarray(image)


def _runs(text: str, size: int) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """Split a text where its font changes."""
    fonts, run, current = _fonts(size), "", 0
    for letter in text:
        index = current
        if unicodedata.category(letter) not in _INVISIBLE:
            found = next((k for k in range(len(fonts)) if _has_letter(k, letter)), None)
            if found is None:
                _warn_of_font(text)
            index = found or 0
        if index != current and run:
            yield fonts[current], run
            run = ""
        run, current = run + letter, index
    if run:
        yield fonts[current], run


@functools.cache
def _has_letter(font: int, letter: str) -> bool:
    shapes = [_fonts(16)[font].getmask(text) for text in (letter, _NO_GLYPH)]
    return shapes[0].size != shapes[1].size or bytes(shapes[0]) != bytes(shapes[1])


@functools.cache
def _fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    installed = _installed_fonts()
    fonts = []
    for name in _FONTS:
        try:
            fonts += [ImageFont.truetype(installed[name.lower()], size)] if name.lower() in installed else []
        except OSError:  # a font that FreeType cannot read
            continue
    default = ImageFont.load_default(size)  # Latin letters
    return [*fonts, *([default] if isinstance(default, ImageFont.FreeTypeFont) else [])]


@functools.cache
def _installed_fonts() -> dict[str, str]:
    """Return lower-case file name -> path of the installed fonts."""
    home, environment = os.path.expanduser("~"), os.environ
    if sys.platform == "win32":
        roots = [
            os.path.join(environment.get("WINDIR", r"C:\Windows"), "Fonts"),
            os.path.join(environment.get("LOCALAPPDATA", home), "Microsoft", "Windows", "Fonts"),
        ]
    elif sys.platform == "darwin":
        roots = ["/System/Library/Fonts", "/Library/Fonts", os.path.join(home, "Library", "Fonts")]
    else:
        shared = environment.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        own = environment.get("XDG_DATA_HOME") or os.path.join(home, ".local", "share")
        roots = [os.path.join(folder, "fonts") for folder in (*shared.split(":"), own)]
        roots.append(os.path.join(home, ".fonts"))
    return {
        name.lower(): os.path.join(path, name) for root in roots for path, _, names in os.walk(root) for name in names
    }


_warned: list[str] = []


def _warn_of_font(text: str) -> None:
    if not _warned:
        _warned.append(text)
        logger.warning("No installed font can draw labels such as %s. Fix: install one (fonts-noto-cjk).", text)
