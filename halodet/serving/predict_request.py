"""Parsing of the requests of ``POST /predict``."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halodet.errors import HalodetError
from halodet.serving.responses import MASK_FORMATS, MaskFormat

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

__all__ = ["PredictRequest", "RequestError", "read_predict_request"]

_NAME_LENGTH = 100
_SETTINGS = ("score_threshold", "masks")


class RequestError(HalodetError, ValueError):
    """A request is invalid.

    Args:
        status: HTTP status of the answer.
        message: one sentence for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class PredictRequest:
    """Image and settings of a request.

    Attributes:
        data: content of the image file.
        name: name of the image in errors.
        score_threshold: minimum score.
        masks: format of masks.
    """

    data: bytes
    name: str
    score_threshold: float
    masks: MaskFormat


async def read_predict_request(request: Request, min_threshold: float, default_threshold: float) -> PredictRequest:
    """Read a multipart form with a ``file``, or a JSON object with an ``image`` in base64.

    Args:
        request: the request.
        min_threshold: minimum value of ``score_threshold``.
        default_threshold: value of ``score_threshold`` where the request has none.

    Raises:
        RequestError: the request is invalid.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        fields: Mapping[str, Any] = await _read_form(request)
        data, name = await _form_file(fields), fields["file"].filename
        _check_keys(fields, "file")
    elif kind == "application/json":
        fields = _parse_object(await request.body())
        data, name = _decode_base64(fields), "image"
        _check_keys(fields, "image")
    else:
        raise RequestError(
            415, "The content type is invalid: expected multipart/form-data or application/json. Fix: see /docs."
        )
    return PredictRequest(
        data, _printable(name) or "image", _threshold(fields, min_threshold, default_threshold), _mask_format(fields)
    )


async def _read_form(request: Request) -> FormData:
    try:
        return await request.form(max_files=1, max_fields=8)
    except (HTTPException, ValueError, KeyError, AttributeError) as error:  # as its parser raises on malformed bodies
        raise RequestError(400, "The multipart form is malformed: expected a field file and settings.") from error


async def _form_file(fields: Mapping[str, Any]) -> bytes:
    file = fields.get("file")
    if not isinstance(file, UploadFile):
        raise RequestError(422, "The form has no file: expected a field file with an image.")
    return await file.read()


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "The body is not JSON: expected an object with image, in base64.") from error
    if not isinstance(fields, dict):
        raise RequestError(422, "The body is not a JSON object: expected an object with image, in base64.")
    return fields


def _decode_base64(fields: Mapping[str, Any]) -> bytes:
    text = fields.get("image")
    if not isinstance(text, str):
        raise RequestError(422, "The object has no image: expected the content of an image file in base64.")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(422, "image is not base64: expected the content of an image file in base64.") from error


def _check_keys(fields: Mapping[str, Any], content: str) -> None:
    for key in fields:
        if key not in (content, *_SETTINGS):
            raise RequestError(
                422, f"{_printable(key)} is no setting: expected {content}, {' and '.join(_SETTINGS)} only."
            )


def _threshold(fields: Mapping[str, Any], minimum: float, default: float) -> float:
    given = fields.get("score_threshold", default)
    try:
        number = float("nan") if isinstance(given, bool | UploadFile) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not minimum <= number <= 1:
        raise RequestError(
            422, f"score_threshold={_printable(given)} is invalid: expected a number from {minimum:g} to 1."
        )
    return number


def _mask_format(fields: Mapping[str, Any]) -> MaskFormat:
    given: Any = fields.get("masks", "rle")
    if given not in MASK_FORMATS:
        raise RequestError(422, f"masks={_printable(given)} is invalid: expected {', '.join(MASK_FORMATS)}.")
    return given


def _printable(value: Any) -> str:
    """Return text of a client as one short line."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)[: _NAME_LENGTH + 1])
    return text if len(text) <= _NAME_LENGTH else f"{text[:_NAME_LENGTH]}..."
