"""The formats of exports as parameters of tests; the oldest supported versions are tried without ONNX."""

from importlib.util import find_spec

import pytest

needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs lightning-prune[onnx]")

FORMATS = [pytest.param("onnx", marks=needs_onnx), "torch_export", "torchscript"]
