"""Text of others in Markdown and HTML."""

from __future__ import annotations

__all__ = ["plain_text"]


def plain_text(text: str) -> str:
    """Escape text for Markdown and HTML."""
    return "".join(f"&#{ord(letter)};" if letter in "\\`*_{}[]<>()#!|~&$" else letter for letter in text)
