"""What an ONNX file calls its inputs and outputs, and that each name means the tensor that it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import FORMATS, needs_onnx
from torch import Tensor, nn

from lightning_prune.exporting import export, onnx_latency
from lightning_prune.exporting.formats import session_of
from lightning_prune.exporting.names import input_names, output_names
from lightning_prune.inputs import Inputs, bind

A, B = torch.rand(2, 4), torch.rand(2, 4)


class Minus(nn.Module):
    """Not the same with its inputs exchanged; what it returns is called as what it does inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor, power: int = 1) -> dict[str, Tensor]:
        hidden = self.layer(a) - b
        return {"linear": hidden.relu() ** power, "relu": hidden, "a": self.layer(hidden.relu())}


@needs_onnx
@pytest.mark.parametrize("example", [(A, B), {"a": A, "b": B}, {"b": B, "a": A}], ids=["positional", "named", "turned"])
def test_a_name_is_its_tensor(tmp_path: Path, example: Any) -> None:
    torch.manual_seed(0)
    net = Minus().eval()
    done = export(net, tmp_path / "net.onnx", example_inputs=example)
    session = session_of(done.path, 1)
    assert [each.name for each in session.get_outputs()] == ["linear", "relu", "a_out"]
    seen = {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    found = session.run(["relu", "a_out"], {name: tensor.numpy() for name, tensor in seen.items()})
    wanted = net(**seen)
    torch.testing.assert_close(torch.as_tensor(found[0]), wanted["relu"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.as_tensor(found[1]), wanted["a"], rtol=1e-4, atol=1e-5)
    assert onnx_latency(done.path, bind(net, example), seconds=0.01) > 0


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, pair: tuple[Tensor, Tensor], more: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        summed = self.layer(pair[0]) + pair[1] * more["scale"]
        return summed, [summed * more["shift"], pair[0] + 1]


@pytest.mark.parametrize("format", FORMATS)
def test_nested_inputs(tmp_path: Path, format: Any) -> None:
    """A dict that comes last is an input, and no keywords."""
    done = export(Nested(), tmp_path / "net", format=format, example_inputs=((A, B), {"scale": A, "shift": B}))
    assert done.difference < 1e-5
    if format == "onnx":
        session = session_of(done.path, 1)
        assert [each.name for each in session.get_inputs()] == ["pair_0", "pair_1", "more_scale", "more_shift"]
        assert [each.name for each in session.get_outputs()] == ["output_0", "output_1_0", "output_1_1"]


def test_names_of_open_arguments() -> None:
    class Open(nn.Module):
        def forward(self, *rows: Tensor, **further: Tensor) -> Tensor:
            return rows[0] + rows[1] + further["bias"]

    assert input_names(Open(), Inputs((A, B), {"bias": B})) == ["rows_0", "rows_1", "bias"]
    assert output_names((A, None, {"x": B}), ["output_0"]) == ["output_0_out", "output_2"]
