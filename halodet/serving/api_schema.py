"""OpenAPI descriptions of the requests and answers of ``POST /predict``."""

from __future__ import annotations

from typing import Any

from halodet.serving.responses import MASK_FORMATS

__all__ = ["PREDICT_BODY", "PREDICT_RESPONSES"]

_SETTINGS: dict[str, Any] = {
    "score_threshold": {"type": "number", "description": "Minimum score, from min_score_threshold of /classes to 1."},
    "masks": {"type": "string", "enum": list(MASK_FORMATS), "default": "rle", "description": "Format of masks."},
}


def _body(key: str, content: dict[str, str]) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": [key], "properties": {key: content, **_SETTINGS}}}


PREDICT_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": _body("file", {"type": "string", "format": "binary", "description": "Image file."}),
        "application/json": _body(
            "image", {"type": "string", "format": "byte", "description": "Content of an image file in base64."}
        ),
    },
}
PREDICT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Objects as COCO annotations with their score, and segments of the models that find them."},
    400: {"description": "The body is malformed."},
    408: {"description": "The request did not arrive in time."},
    413: {"description": "The request is too large."},
    415: {"description": "The content type is not supported."},
    422: {"description": "The image cannot be read, or a setting is invalid."},
    503: {"description": "Too many requests are waiting."},
}
