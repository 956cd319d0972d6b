"""Page that describes the routes of an OpenAPI document, without scripts and without other hosts."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

__all__ = ["docs_page"]


def docs_page(document: Mapping[str, Any]) -> str:
    """Return an HTML page with the routes, request bodies and answers of an OpenAPI document."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        "<meta name=color-scheme content='light dark'>",
        f"<title>{html.escape(document['info']['title'])}</title>",
        f"<h1>{html.escape(document['info']['title'])} {html.escape(document['info']['version'])}</h1>",
        "<p>The same in the OpenAPI format: <a href=openapi.json>openapi.json</a></p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += [f"<h2>{method.upper()} {html.escape(path)}</h2>", f"<p>{html.escape(operation['summary'])}.</p>"]
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                parts += [f"<h3>Request: {html.escape(kind)}</h3>", _properties(content["schema"])]
            answers = operation["responses"].items()
            rows = "".join(f"<dt>{code}<dd>{html.escape(answer['description'])}" for code, answer in sorted(answers))
            parts.append(f"<h3>Answers</h3><dl>{rows}</dl>")
    return "\n".join(parts)


def _properties(schema: Mapping[str, Any]) -> str:
    rows = []
    for name, value in schema["properties"].items():
        kind = " | ".join(value["enum"]) if "enum" in value else value["type"]
        kind += ", required" if name in schema["required"] else ""
        rows.append(f"<dt>{html.escape(name)} ({html.escape(kind)})<dd>{html.escape(value['description'])}")
    return f"<dl>{''.join(rows)}</dl>"
