"""Static quantization of an ONNX file to int8 by ONNX Runtime."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Convolutions and fully connected layers. Attention stays in float: the keys of its matrix products carry the mask of
# pixels outside the map, whose range would leave no steps for the rest.
QUANTIZED = ("Conv", "Gemm")


def quantize(proto: Any, images: Iterable[np.ndarray], scratch: Path) -> Any:
    """Quantize the convolutions and fully connected layers of an ONNX model.

    Args:
        proto: ONNX model with one input ``image``.
        images: inputs from which the ranges of activations are measured.
        scratch: folder for temporary files.

    Returns:
        The quantized ONNX model, with int8 weights per output channel and uint8 activations.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            return None if image is None else {"image": image}

    with tempfile.TemporaryDirectory(dir=scratch) as folder, _no_warnings():
        given, result = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, str(given))
        quantize_static(
            str(given),
            str(result),
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(str(result))


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence ONNX Runtime's advice, which it logs with the root logger."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(level)
