"""Files that others can run: ONNX, torch.export and TorchScript, checked against the network that they came from."""

from lightning_prune.exporting.export import Exported, export
from lightning_prune.exporting.formats import FORMATS, Format
from lightning_prune.exporting.latency import onnx_latency

__all__ = ["FORMATS", "Exported", "Format", "export", "onnx_latency"]
