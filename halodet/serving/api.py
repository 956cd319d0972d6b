"""HTTP interface of a detector."""

from __future__ import annotations

from typing import Any

from halodet import __version__
from halodet.errors import ImageError
from halodet.serving.api_schema import PREDICT_BODY, PREDICT_RESPONSES
from halodet.serving.detector import Detector, ModelError
from halodet.serving.docs_page import docs_page
from halodet.serving.predict_request import PredictRequest, RequestError, read_predict_request
from halodet.serving.responses import prediction

import anyio
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["make_api"]

_CLIENT_CLOSED_REQUEST = 499


def make_api(detector: Detector, max_waiting: int) -> FastAPI:
    """Return the application with the routes ``/predict``, ``/health``, ``/classes``, ``/docs`` and ``/openapi.json``.

    Args:
        detector: the detector.
        max_waiting: number of requests that may wait for the detector; further ones are answered with 503.
    """
    # FastAPI's own pages load their scripts from another host.
    api = FastAPI(title="halodet", version=__version__, docs_url=None, redoc_url=None)
    worker: list[anyio.CapacityLimiter] = []

    def work(given: PredictRequest) -> Response:
        """Decode, predict and convert; errors are returned, because a task group would wrap them."""
        try:
            image = detector.read(given.data, given.name)
            result = detector.predict(image).filter(given.score_threshold)
            return JSONResponse(prediction(result, given.score_threshold, given.masks))
        except ImageError as error:
            return JSONResponse({"error": str(error)}, 422)
        except ModelError as error:
            return JSONResponse({"error": str(error)}, 500)

    @api.post(
        "/predict",
        summary="Detect objects in an image",
        openapi_extra={"requestBody": PREDICT_BODY},
        responses=PREDICT_RESPONSES,
    )
    async def predict(request: Request) -> Response:
        given = await read_predict_request(request, detector.min_threshold, detector.score_threshold)
        if not worker:
            worker.append(anyio.CapacityLimiter(1))  # it belongs to the event loop
        if worker[0].statistics().tasks_waiting >= max_waiting:
            message = f"{max_waiting} requests are waiting already. Fix: try again later."
            return JSONResponse({"error": message}, 503, {"Retry-After": "5"})
        response = Response(status_code=_CLIENT_CLOSED_REQUEST)
        async with anyio.create_task_group() as tasks:

            async def cancel_on_disconnect() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()  # a request that waits leaves the queue

            tasks.start_soon(cancel_on_disconnect)
            response = await anyio.to_thread.run_sync(work, given, limiter=worker[0])
            tasks.cancel_scope.cancel()
        return response

    @api.get("/health", summary="Return the state of the server")
    async def health() -> dict[str, Any]:
        waiting = worker[0].statistics().tasks_waiting if worker else 0
        return {"status": "ok", "model": detector.name, "version": __version__, "waiting": waiting}

    @api.get("/classes", summary="Return the classes of the model and the range of score thresholds")
    async def classes() -> dict[str, Any]:
        return {
            "classes": [{"id": entry["id"], "name": entry["name"]} for entry in detector.classes],
            "stuff_classes": list(detector.stuff_classes),
            "min_score_threshold": detector.min_threshold,
            "default_score_threshold": detector.score_threshold,
        }

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(api.openapi()), headers={"Content-Security-Policy": "default-src 'none'"})

    @api.exception_handler(RequestError)
    async def answer_request_error(request: Request, error: RequestError) -> Response:
        return JSONResponse({"error": str(error)}, error.status)

    @api.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: expected a route of /docs."
        return JSONResponse({"error": message}, error.status_code, error.headers)

    return api
