"""At sampled points, the work of a layer is one product with a matrix: rows as what the layer itself returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from own_forwards import SameConv2d, Standardized
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune.errors import PruningError
from lightning_prune.sampling import (
    Layer,
    draw_points,
    groups_of,
    inputs_at,
    is_product,
    matrix_of,
    outputs_at,
    read_by_product,
    taps_of,
    weight_from,
)

EXACT = 1e-12
SAME_OF_EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=Generator().manual_seed(1))


def drawn(layer: Layer, inputs: Tensor, most: int, seed: int = 0) -> Tensor:
    return draw_points(layer, inputs, most, Generator().manual_seed(seed))


def product(layer: Layer, rows: Tensor) -> Tensor:
    """Do a layer's work on rows."""
    made = torch.einsum("rgp,gop->rgo", rows, matrix_of(layer))
    return made if layer.bias is None else made + layer.bias.detach().view(groups_of(layer), -1)


def assert_is_product(layer: Layer, inputs: Tensor, most: int = 7) -> None:
    """Hold the rows against the layer's output: all of them, and some."""
    layer = layer.double()
    with torch.no_grad():
        output = layer(inputs)
    for count in (most, 10**6):
        points = drawn(layer, inputs, count)
        made, wanted = product(layer, inputs_at(layer, inputs, points)), outputs_at(layer, output, points)
        assert made.shape == wanted.shape
        assert float((made - wanted).abs().max()) < EXACT * max(float(output.abs().max()), 1)
    assert wanted.numel() == output.numel()
    assert torch.equal(wanted.flatten().sort().values, output.flatten().sort().values)
    assert torch.equal(weight_from(layer, matrix_of(layer)), layer.weight)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 4, 5), (3, 2, 4, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    assert_is_product(nn.Linear(5, 6, bias=bias), random(*shape))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "same, dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "circular, same": {"padding": "same", "padding_mode": "circular"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 3},
    "dilated": {"padding": 2, "dilation": 2, "stride": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1, "stride": 2},
    "depthwise, twice": {"groups": 4, "out_channels": 8},
    "no bias": {"bias": False, "padding": 1},
    "pointwise": {"kernel_size": 1, "stride": 2},
}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = (9, 7, 6)


@SAME_OF_EVEN
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_convolution(name: str, dims: int) -> None:
    layer = CONVOLUTIONS[dims](**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **SETTINGS[name]})
    assert_is_product(layer, random(2, 4, *SIZES[:dims]))


def test_each_axis_has_settings_of_its_own() -> None:
    layer = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3))
    assert_is_product(layer, random(2, 3, 8, 9))
    upward = nn.ConvTranspose2d(3, 5, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(2, 3))
    assert_is_product(upward, random(2, 3, 4, 5))


UPWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2},
    "gaps": {"stride": 3, "kernel_size": 2},
    "padding": {"stride": 2, "padding": 1},
    "output padding": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilated": {"stride": 2, "dilation": 2},
    "dilated, output padding": {"stride": 1, "dilation": 2, "output_padding": 1},
    "grouped": {"groups": 2, "out_channels": 6, "stride": 2},
    "depthwise": {"groups": 4, "stride": 2, "padding": 1},
    "depthwise, twice": {"groups": 4, "out_channels": 8},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("name", UPWARD)
@pytest.mark.parametrize("dims", TRANSPOSED)
def test_transposed_convolution(name: str, dims: int) -> None:
    layer = TRANSPOSED[dims](**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **UPWARD[name]})
    assert_is_product(layer, random(2, 4, *(4, 3, 3)[:dims]))


@pytest.mark.parametrize("make", [*CONVOLUTIONS.values(), *TRANSPOSED.values()])
def test_an_example_without_a_batch(make: Callable[..., _ConvNd]) -> None:
    layer = make(4, 6, 3, padding=1, groups=2)
    assert_is_product(layer, random(4, *SIZES[: len(layer.kernel_size)]))


@st.composite
def _any_convolution(draw: st.DrawFn) -> tuple[_ConvNd, Tensor]:
    dims, number = draw(st.integers(1, 3)), st.integers(1, 3)
    each = st.tuples(*[number] * dims)
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    wide = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    common = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if draw(st.booleans()):
        pads = tuple(draw(st.integers(0, far * (taps - 1) // 2)) for far, taps in zip(dilation, kernel, strict=True))
        most = tuple(max(pair) - 1 for pair in zip(stride, dilation, strict=True))
        more = tuple(draw(st.integers(0, end)) for end in most)
        layer: _ConvNd = TRANSPOSED[dims](*wide, kernel, padding=pads, output_padding=more, **common)
        return layer, random(2, wide[0], *(draw(st.integers(2, 4)) for _ in range(dims)))
    mode = draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
    if max(stride) == 1 and draw(st.booleans()):
        layer = CONVOLUTIONS[dims](*wide, kernel, padding=draw(st.sampled_from(("same", "valid"))), **common)
    else:
        layer = CONVOLUTIONS[dims](*wide, kernel, padding=draw(each), padding_mode=mode, **common)
    return layer, random(2, wide[0], *(draw(st.integers(7, 8)) for _ in range(dims)))


@SAME_OF_EVEN
@given(_any_convolution(), st.integers(1, 5))
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_any_convolution(case: tuple[_ConvNd, Tensor], most: int) -> None:
    assert_is_product(*case, most)


def test_a_single_tap_reads_what_stands_there() -> None:
    """By hand: out of a map of 1..9, the point 3 (row 1, column 0) reads the kernel's nine places around 4."""
    layer = nn.Conv2d(1, 1, 3, padding=1).double()
    image = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 1, 3, 3)
    rows = inputs_at(layer, image, torch.tensor([[3]]))
    assert rows.tolist() == [[[0, 1, 2, 0, 4, 5, 0, 7, 8]]]


def test_columns_are_ordered_by_channel_then_tap() -> None:
    layer = nn.Conv1d(4, 2, 3, groups=2).double()
    assert matrix_of(layer).shape == (2, 1, 6)
    assert torch.equal(matrix_of(layer)[1, 0, :3], layer.weight.detach()[1, 0])
    assert torch.equal(matrix_of(layer)[1, 0, 3:], layer.weight.detach()[1, 1])
    assert (taps_of(layer), groups_of(layer)) == (3, 2)
    assert (taps_of(nn.Linear(3, 4)), groups_of(nn.Linear(3, 4))) == (1, 1)


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_weight_comes_back_in_its_own_dtype(make: Callable[..., _ConvNd]) -> None:
    layer = make(4, 6, 3, groups=2).to(torch.bfloat16)
    back = weight_from(layer, matrix_of(layer).double())
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, layer.weight)


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3)], ids=["down", "up"])
def test_points_are_distinct_and_inside(layer: _ConvNd) -> None:
    images = random(50, 2, 6, 6)
    there = layer.double()(images)[0, 0].numel()
    points = drawn(layer, images, there - 1)
    assert points.shape == (50, there - 1)
    assert all(len(set(line)) == there - 1 for line in points.tolist())
    assert 0 <= int(points.min()) <= int(points.max()) == there - 1
    assert len({tuple(line) for line in points.tolist()}) == 50, "each example has points of its own"


def test_all_points_are_taken_when_few() -> None:
    layer, images = nn.Conv2d(2, 3, 3, stride=2), random(3, 2, 5, 5)
    for most in (4, 5, 10**6):
        assert drawn(layer, images, most).tolist() == [[0, 1, 2, 3]] * 3
    assert drawn(nn.Linear(2, 3), random(7, 2), 10).tolist() == [[0]] * 7


def test_points_depend_on_the_seed_alone() -> None:
    layer, images = nn.Conv2d(2, 3, 3), random(4, 2, 9, 9)
    assert torch.equal(drawn(layer, images, 5, 3), drawn(layer, -images, 5, 3))
    assert not torch.equal(drawn(layer, images, 5, 3), drawn(layer, images, 5, 4))


def test_every_point_is_as_likely() -> None:
    points = drawn(nn.Linear(2, 3), random(4000, 5, 2), 2)
    shares = points.flatten().bincount(minlength=5) / 4000
    assert float((shares - 0.4).abs().max()) < 0.04  # five standard deviations


def test_what_is_a_product() -> None:
    assert all(is_product(layer) for layer in (nn.Linear(2, 3), nn.Conv1d(2, 3, 1), nn.ConvTranspose3d(2, 3, 1)))
    assert not any(is_product(layer) for layer in (None, nn.ReLU(), nn.Bilinear(2, 2, 2)))
    assert not is_product(weight_norm(nn.Linear(2, 3)))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Conv2d):
    """Has no forward of its own."""


@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_that_pads_by_itself_reads_what_it_has_padded(groups: int) -> None:
    layer, images = SameConv2d(2, 4, 3, stride=2, groups=groups).double(), random(3, 2, 6, 6)
    read = read_by_product(layer, images)
    assert torch.equal(read, F.pad(images, (0, 1, 0, 1)))
    with torch.no_grad():
        output = layer(images)
    points = drawn(layer, read, 10**6)
    made, wanted = product(layer, inputs_at(layer, read, points)), outputs_at(layer, output, points)
    assert float((made - wanted).detach().abs().max()) < EXACT


def test_layers_without_a_forward_of_their_own_read_their_input() -> None:
    for layer in (nn.Conv2d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3), nn.Linear(5, 2), Renamed(2, 2, 3, padding=1)):
        images = torch.rand(1, 2, 5, 5)
        assert read_by_product(layer, images) is images  # type: ignore[arg-type]


def test_a_forward_of_its_own_that_is_the_product_is_taken() -> None:
    class Told(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    rows = torch.rand(3, 5)
    assert read_by_product(Told(5, 2), rows) is rows


@pytest.mark.parametrize("layer", [Standardized(2, 3, 3), Scaled(5, 2)], ids=["weight", "result"])
def test_a_layer_that_does_more_is_refused_by_name(layer: Layer) -> None:
    kind = type(layer)
    with pytest.raises(PruningError, match=rf"A {kind.__name__} does more than a {kind.__mro__[1].__name__}.*`ignore`"):
        read_by_product(layer, torch.rand(1, 2, 5, 5))
