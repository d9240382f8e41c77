"""The quick rules on meta tensors: what torch returns, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_map
from versions import needs

from lightning_prune import find_groups, meta
from lightning_prune.inputs import flat_tensors

aten = torch.ops.aten
Arguments = tuple[Any, ...]


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def last(*shape: int) -> Tensor:
    """A tensor in another memory format."""
    return t(*shape).to(memory_format=torch.channels_last)


def conv(
    source: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: tuple[int, ...] = (0, 0), **settings: Any
) -> Arguments:
    dims = weight.dim() - 2
    spread = [settings.get(name, [value] * dims) for name, value in (("stride", 1), ("padding", 0), ("dilation", 1))]
    extra = list(out[:dims]) if len(out) >= dims else [0] * dims
    return (source, weight, bias, *spread, settings.get("transposed", False), extra, settings.get("groups", 1))


HALF, LONG = torch.float16, torch.int64

CONVOLUTIONS = [
    conv(t(2, 4, 9, 9), t(6, 4, 3, 3), t(6)),
    conv(t(2, 4, 9, 8), t(6, 4, 3, 1), stride=[2, 3], padding=[1, 2]),
    conv(t(2, 4, 11, 11), t(6, 4, 3, 3), t(6), dilation=[2, 3], padding=[3, 0], stride=[3, 2]),
    conv(t(2, 8, 9, 9), t(6, 4, 3, 3), groups=2),
    conv(t(2, 8, 9, 9), t(16, 1, 3, 3), t(16), groups=8),
    conv(t(0, 4, 9, 9), t(6, 4, 3, 3)),
    conv(t(2, 4, 9), t(6, 4, 3), t(6)),
    conv(t(2, 4, 5, 6, 7), t(6, 4, 2, 3, 4), padding=[1, 0, 2]),
    conv(t(2, 4, 5, 5), t(4, 6, 3, 3), t(6), transposed=True),
    conv(t(2, 4, 5, 6), t(4, 6, 3, 2), transposed=True, stride=[2, 3], padding=[1, 0], out=(1, 2)),
    conv(t(2, 4, 5, 5), t(4, 3, 3, 3), t(6), transposed=True, groups=2, dilation=[2, 1]),
    conv(t(2, 4, 5), t(4, 6, 3), transposed=True, stride=[2], out=(1,)),
    conv(t(2, 4, 9, 9, dtype=HALF), t(6, 4, 3, 3, dtype=HALF), t(6, dtype=HALF)),
]

TAKEN: dict[str, list[Arguments]] = {
    "convolution": CONVOLUTIONS,
    "native_batch_norm": [
        (t(2, 4, 5, 5), t(4), t(4), t(4), t(4), False, 0.1, 1e-5),
        (t(2, 4, 5, 5), t(4), t(4), t(4), t(4), True, 0.1, 1e-5),
        (t(2, 4), t(4), None, t(4), t(4), False, 0.1, 1e-5),
        (t(2, 4, 3, 3, 3), None, None, t(4), t(4), False, 0.1, 1e-5),
    ],
    "native_layer_norm": [
        (t(2, 3, 8), [8], t(8), t(8), 1e-5),
        (t(2, 3, 8), [3, 8], t(3, 8), None, 1e-5),
        (t(8), [8], None, None, 1e-5),
    ],
    "native_group_norm": [
        (t(2, 6, 4, 4), t(6), t(6), 2, 6, 16, 3, 1e-5),
        (t(2, 6, 4), None, None, 2, 6, 4, 6, 1e-5),
        (t(2, 6), t(6), None, 2, 6, 1, 1, 1e-5),
    ],
    "mm": [(t(2, 3), t(3, 4)), (t(2, 3), t(4, 3).t()), (t(0, 3), t(3, 4)), (t(2, 0), t(0, 4))],
    "bmm": [
        (t(2, 3, 4), t(2, 4, 5)),
        (t(2, 3, 4), t(2, 5, 4).mT),
        (t(2, 4, 3).mT, t(2, 4, 5)),
        (t(2, 0, 4), t(2, 4, 5)),
    ],
    "addmm": [(t(4), t(2, 3), t(3, 4)), (t(4), t(2, 3), t(4, 3).t())],
    "_softmax": [(t(2, 3), 1, False), (t(2, 3, 4), -2, False)],
    "_log_softmax": [(t(2, 3), 1, False)],
    "_safe_softmax": [(t(2, 3), 1), (t(2, 3), -1, torch.float32)],
    "cat": [
        ([t(2, 3), t(2, 5)], 1),
        ([t(2, 3), t(4, 3)],),
        ([t(2, 3, 4), t(2, 1, 4), t(2, 2, 4)], -2),
        ([t(2, 3)], 1),
        ([t(2, 3), t(2, 0)], 1),
    ],
    "roll": [(t(2, 3), [1], [0]), (t(2, 3), [1])],
    "hardtanh": [(t(2, 3), -2.0, 2.0)],
    "leaky_relu": [(t(2, 3), 0.2)],
    "elu": [(t(2, 3), 1.0, 2.0, 3.0)],
    "softplus": [(t(2, 3), 2.0, 20.0)],
}
for _name in ("mean", "sum"):
    TAKEN[_name] = [(t(2, 3, 4), [1]), (t(2, 3, 4), [-1, 0]), (t(2, 3, 4), [1, 2], True), (t(2, 0, 4), [2])]
for _name in ("mul", "add", "sub", "div"):
    TAKEN[_name] = [
        (t(2, 3), t(2, 3)),
        (t(2, 3, 4), t(3, 1)),
        (t(4), t(2, 3, 4)),
        (t(2, 3), t()),
        (t(), t(2, 3)),
        (t(2, 3), 2),
        (t(2, 3), 0.5),
        (last(2, 3, 4, 5), t(3, 1, 1)),
        (t(3, 1, 1), last(1, 3, 4, 5)),
        (last(1, 3, 4, 5), t()),
    ]
    TAKEN[f"{_name}_"] = [
        (t(2, 3), t(2, 3)),
        (t(2, 3, 4), t(3, 1)),
        (t(2, 3), t()),
        (last(2, 3, 4, 5), t(3, 1, 1)),
        (t(3, 2).t(), t(2, 3)),
    ]

NAMED: dict[str, list[tuple[Arguments, dict[str, Any]]]] = {
    "addmm": [((t(4), t(2, 3), t(3, 4)), {"beta": 2, "alpha": 0.5})],
    "gelu": [((t(2, 3),), {"approximate": "tanh"})],
    "add": [((t(2, 3), t(3)), {"alpha": 2}), ((t(2, 3), 2), {})],
    "sub": [((t(2, 3), t(3)), {"alpha": 2})],
}

ORDINARY: list[Arguments] = [(t(2, 3),), (t(2, 3, 4, 5),), (t(),), (t(0, 3),), (t(2, 3, dtype=HALF),)]

DECLINED: dict[str, list[Arguments]] = {
    "convolution": [
        conv(last(2, 4, 9, 9), t(6, 4, 3, 3)),
        conv(t(2, 4, 9, 9), last(6, 4, 3, 3)),
        conv(t(2, 4, 9, 9), t(6, 4, 3, 3), t(5)),
        conv(t(2, 5, 9, 9), t(6, 4, 3, 3)),
        conv(t(2, 4, 2, 2), t(6, 4, 3, 3)),
        conv(t(4, 9, 9), t(6, 4, 3, 3)),
        conv(t(2, 8, 9, 9), t(7, 4, 3, 3), groups=2),
        conv(t(2, 4, 9, 9, dtype=HALF), t(6, 4, 3, 3)),
        conv(t(2, 4, 9, 9), t(6, 4, 3, 3), stride=[1]),
        conv(t(2, 5, 9, 9), t(4, 6, 3, 3), transposed=True),
    ],
    "native_batch_norm": [
        (t(2, 4, 5, 5), t(3), t(4), t(4), t(4), False, 0.1, 1e-5),
        (last(2, 4, 5, 5), t(4), t(4), t(4), t(4), False, 0.1, 1e-5),
        (t(2, 4, 5, 5, dtype=HALF), t(4), t(4), t(4), t(4), False, 0.1, 1e-5),
    ],
    "native_layer_norm": [
        (t(2, 3, 8), [7], t(7), t(7), 1e-5),
        (t(2, 3, 8), [8], t(7), None, 1e-5),
        (t(2, 8, 3).mT, [8], t(8), t(8), 1e-5),
        (t(2, 8, dtype=HALF), [8], t(8), t(8), 1e-5),
    ],
    "native_group_norm": [
        (t(2, 6, 4, 4), t(5), t(6), 2, 6, 16, 3, 1e-5),
        (t(2, 6, 4, 4), t(6), t(6), 2, 6, 16, 4, 1e-5),
        (last(2, 6, 4, 4), t(6), t(6), 2, 6, 16, 3, 1e-5),
    ],
    "mm": [(t(2, 3), t(4, 5)), (t(2, 3), t(3, 4, dtype=HALF))],
    "bmm": [(t(2, 3, 4), t(2, 5, 4)), (t(2, 3, 4), t(3, 4, 5)), (t(2, 3, 4), t(2, 4, 5, dtype=HALF))],
    "addmm": [(t(2, 4), t(2, 3), t(3, 4)), (t(1), t(2, 3), t(3, 4)), (t(4, dtype=HALF), t(2, 3), t(3, 4))],
    "_softmax": [(t(2, 3, dtype=HALF), 1, True), (t(3, 2).t(), 1, False), (t(2, 3, dtype=LONG), 1, False)],
    "_log_softmax": [(t(2, 3, dtype=HALF), 1, True), (t(3, 2).t(), 1, False)],
    "_safe_softmax": [(t(2, 3), 1, torch.float64), (t(3, 2).t(), 1)],
    "cat": [
        ([t(2, 3), t(3, 3)], 1),
        ([t(2, 3), t(2, 3, dtype=HALF)], 1),
        ([t(2, 3), t(2)], 1),
        ([t(), t()], 0),
        ([t(3, 2).t(), t(2, 3)], 1),
        ([t(0), t(2, 3)], 0),
    ],
    "roll": [(t(3, 2).t(), [1], [0]), (t(2, 3, dtype=LONG), [1], [0])],
}
for _name in ("mean", "sum"):
    DECLINED[_name] = [(t(3, 2).t(), [1]), (t(2, 3), []), (t(2, 3), None), (t(2, 3, dtype=LONG), [1])]
for _name in ("mul", "add", "sub", "div"):
    DECLINED[_name] = [
        (t(2, 1), t(1, 3)),
        (t(2, 3), t(2)),
        (t(2, 3), t(2, 3, dtype=HALF)),
        (t(2, 3, dtype=LONG), t(2, 3, dtype=LONG)),
        (t(3, 2).t(), t(2, 3)),
        (t(2, 3), torch.empty(())),
        (t(2, 3), 1j),
        (last(2, 3, 4, 5), t(6, 1, 1)[::2]),
        (last(2, 3, 8, 5)[:, :, ::2], t(3, 1, 1)),
    ]
STRANGE: list[Arguments] = [(t(3, 2).t(),), (last(2, 3, 4, 5),), (t(2, 3, dtype=LONG),), (t(2, 3, dtype=torch.bool),)]


def named(op: OpOverload) -> str:
    return op._schema.name.removeprefix("aten::")


def cases(op: OpOverload, table: dict[str, list[Arguments]], otherwise: list[Arguments]) -> list[Arguments]:
    """Look up the arguments for one overload; an operation in place has those of its functional twin."""
    found = table.get(named(op), table.get(named(op).removesuffix("_"), otherwise))
    wants_number = op._overloadname == "Scalar"
    if op._overloadname not in ("Scalar", "Tensor"):
        return found
    return [arguments for arguments in found if isinstance(arguments[1], Tensor) != wants_number]


OPS = {str(op): op for op in meta._kernels}


def fresh(arguments: Any) -> Any:
    """Make tensors anew, so that operations in place spoil nothing."""
    return tree_map(
        lambda v: (
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) if isinstance(v, Tensor) else v
        ),
        arguments,
    )


def told(out: Any) -> list[tuple[object, ...]]:
    return [(tuple(part.shape), part.stride(), part.dtype, part.device.type) for part in flat_tensors((out,))]


def compare(op: OpOverload, kernel: meta.Kernel, arguments: Arguments, settings: dict[str, Any]) -> None:
    given = fresh(arguments)
    quick = kernel(*given, **settings)
    assert quick is not None, arguments
    again = fresh(arguments)
    asked = op(*again, **settings)
    assert told(quick) == told(asked)
    assert (quick is given[0]) == (asked is again[0])


@pytest.mark.parametrize("name", OPS)
def test_a_quick_answer_is_that_of_torch(name: str) -> None:
    op, kernel = OPS[name], meta.kernel_for(OPS[name])
    assert kernel is not None
    several = cases(op, TAKEN, ORDINARY)
    assert several
    for arguments in several:
        compare(op, kernel, arguments, {})
    for arguments, settings in NAMED.get(named(op), ()):
        if op._overloadname not in ("Scalar", "Tensor") or isinstance(arguments[1], Tensor) == (
            op._overloadname == "Tensor"
        ):
            compare(op, kernel, arguments, settings)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if not named(op).endswith("_")])
def test_out_of_the_ordinary_torch_is_asked_or_agrees(name: str) -> None:
    op, kernel = OPS[name], meta.kernel_for(OPS[name])
    several = cases(op, DECLINED, STRANGE)
    assert several
    for arguments in several:
        if kernel(*fresh(arguments)) is not None:
            assert isinstance(arguments[0], Tensor)
            assert arguments[0].dtype.is_floating_point
            assert not arguments[0].is_contiguous()
            compare(op, kernel, arguments, {})


@pytest.mark.parametrize(
    "name", [name for name, op in OPS.items() if named(op).endswith("_") and op._overloadname != "Tensor"]
)
def test_in_place_the_tensor_itself_comes_back(name: str) -> None:
    kernel, op = meta.kernel_for(OPS[name]), OPS[name]
    for source in (t(2, 3), t(3, 2).t(), last(2, 3, 4, 5)):
        assert kernel(source) is source
        assert op(source) is source
    assert kernel(t(2, 3, dtype=LONG)) is None


@pytest.mark.parametrize("name", ["mul_", "add_", "sub_", "div_"])
def test_in_place_torch_is_asked_what_does_not_fit(name: str) -> None:
    kernel = meta.kernel_for(getattr(aten, name).Tensor)
    assert kernel is not None
    for left, right in (
        *((t(3), t(2, 3)), (t(2, 3), t(2)), (t(2, 3), t(2, 3, dtype=HALF)), (t(2, 3), t(3, 2).t())),
        *((t(2, 3), 2), (t(2, 3), torch.empty(())), (t(3).expand(2, 3), t(3))),
    ):
        assert kernel(left, right) is None


def test_every_kernel_has_arguments_of_its_own_or_takes_a_single_tensor() -> None:
    """A new kernel needs entries in the tables above, unless it is one of a single tensor and its settings."""
    for op in meta._kernels:
        required = [argument for argument in op._schema.arguments if argument.default_value is None]
        tensors = [argument for argument in op._schema.arguments if "Tensor" in str(argument.type)]
        alone = len(tensors) == 1 and [argument.name for argument in required if argument.name != "dtype"] == ["self"]
        listed = named(op) in TAKEN and named(op) in DECLINED
        assert alone or listed or named(op).removesuffix("_") in TAKEN, f"{op} has no arguments in this file"


def test_operations_without_a_rule_are_torch_s() -> None:
    assert meta.kernel_for(aten.convolution_backward.default) is None
    assert meta.kernel_for(aten.add.out) is None


WRONG: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "channels of a convolution": (lambda: nn.Conv2d(4, 6, 3), (2, 5, 9, 9), "to have 4 channels, but got 5"),
    "a kernel larger than the image": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 2, 2), "Kernel size"),
    "channels of a grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 6, 9, 9), "to have 4 channels"),
    "columns of a matrix": (lambda: nn.Linear(4, 6), (2, 5), "shapes cannot be multiplied"),
    "channels of a batch norm": (lambda: nn.BatchNorm2d(4), (2, 5, 3, 3), "should contain 5 elements"),
    "width of a layer norm": (lambda: nn.LayerNorm(4), (2, 5), r"expected input with shape \[\*, 4\]"),
    "channels of a group norm": (lambda: nn.GroupNorm(2, 4), (2, 6, 3), "got weight of shape|[Ee]xpected weight"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs("torch", "2.6", "returns an empty image")) if "larger" in name else name
        for name in WRONG
    ],
)
def test_errors_stay_those_of_torch(name: str) -> None:
    build, shape, message = WRONG[name]
    with pytest.raises(Exception, match=message) as torch_s:
        build()(torch.zeros(shape))
    with pytest.raises(Exception, match=message) as ours:
        find_groups(build(), torch.zeros(shape))
    assert str(torch_s.value) in str(ours.value)


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "torch"])
def test_groups_and_costs_do_not_depend_on_the_rules(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.GELU()),
        *(nn.GroupNorm(4, 8), nn.Flatten(), nn.Linear(128, 12), nn.LayerNorm(12), nn.Softmax(1), nn.Linear(12, 5)),
    )
    if not quick:
        monkeypatch.setattr(meta, "_kernels", {})
    groups = find_groups(net, torch.zeros(2, 3, 6, 6))
    assert [(group.name, group.size, bool(group.frozen)) for group in groups] == [
        ("0", 2, False),
        ("7", 12, False),
        ("10", 5, True),
    ]
