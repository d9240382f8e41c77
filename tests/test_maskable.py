"""Which weights are masked: by layer type, never biases, norms and embeddings, tied ones once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from lightning_prune.errors import PruningError
from lightning_prune.masks.maskable import dense_layers, input_first, maskable


class Everything(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.transposed = nn.ConvTranspose1d(4, 6, 3)
        self.lstm = nn.LSTM(4, 4, num_layers=2, proj_size=2)
        self.cell = nn.GRUCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.bilinear = nn.Bilinear(4, 4, 2)
        self.embedding = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.layer_norm = nn.LayerNorm(4)
        self.prelu = nn.PReLU(4)
        self.free = nn.Parameter(torch.ones(4, 4))


def test_weights_of_layers_and_nothing_else() -> None:
    assert list(maskable(Everything())) == [
        "linear.weight",
        "conv.weight",
        "transposed.weight",
        *(f"lstm.weight_{part}_l{layer}" for layer in (0, 1) for part in ("ih", "hh", "hr")),
        "cell.weight_ih",
        "cell.weight_hh",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "bilinear.weight",
    ]


def test_the_input_of_transposed_convolutions_comes_first() -> None:
    assert input_first(Everything()) == {"transposed.weight"}
    assert input_first(nn.ConvTranspose2d(2, 2, 1)) == {"weight"}


def test_a_module_and_its_wrappers_have_the_same_names() -> None:
    net = nn.Linear(2, 2)
    assert list(maskable(net)) == list(maskable(nn.DataParallel(net))) == ["weight"]


def test_ignored_layers_are_left_out() -> None:
    names = maskable(Everything(), ["lstm", "cell", "cross", "attention*"])
    assert list(names) == ["linear.weight", "conv.weight", "transposed.weight", "bilinear.weight"]
    with pytest.raises(ValueError, match="'head' matches no module"):
        maskable(Everything(), ["head"])


class TestTied:
    def test_shared_weights_stand_once_under_their_first_name(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        assert list(maskable(net)) == ["0.weight", "1.weight"]
        assert list(maskable(net, ["2"])) == ["1.weight"]

    def test_what_is_tied_to_an_embedding_is_one(self) -> None:
        net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))
        net[2].weight = net[0].weight
        assert list(maskable(net)) == ["1.weight"]
        assert list(maskable(nn.Sequential(*reversed(net)))) == ["1.weight"]


class TestWhatDoesNotHoldAMask:
    def test_computed_weights_are_refused_unless_ignored(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        with pytest.raises(PruningError, match=r"'weight' of the layer '1' would not hold: it is computed .*`ignore`"):
            maskable(net)
        assert list(maskable(net, ["1"])) == ["0.weight"]

    def test_weights_that_torch_prunes_are_refused(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        l1_unstructured(net[0], "weight", 1)
        with pytest.raises(PruningError, match=r"torch\.nn\.utils\.prune"):
            maskable(net)
        assert list(maskable(net, ["0"])) == ["1.weight"]

    def test_lazy_layers_are_refused(self) -> None:
        net = nn.LazyLinear(2)
        with pytest.raises(PruningError, match="has no shape yet"):
            maskable(net)

    def test_integers_are_refused(self) -> None:
        net = nn.Linear(2, 2)
        net.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        with pytest.raises(PruningError, match=r"is of type torch\.int8"):
            maskable(net)

    @pytest.mark.parametrize("net", [nn.BatchNorm1d(3), nn.Embedding(3, 3), nn.Sequential()])
    def test_a_model_without_weights_is_refused(self, net: nn.Module) -> None:
        with pytest.raises(PruningError, match="has no weight that a mask can be put on"):
            maskable(net)


def test_shape_and_deviation_are_noted() -> None:
    net = nn.Linear(4, 1)
    net.weight.data = torch.tensor([[1.0, -1.0, 3.0, -3.0]])
    known = dense_layers(net)["weight"]
    assert known.shape == (1, 4)
    assert known.std == pytest.approx(5**0.5)
