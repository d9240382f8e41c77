"""Channel groups for people: as text, as a table and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
import torch
from proof import Net
from rich.console import Console
from torch import Tensor, nn

from lightning_prune import ChannelGroup, describe, find_groups, picture

OUT = "reaches the model's output"
BLUE, ORANGE, GREY = "#1f5fa8", "#e08a1e", "#b9bec6"


def groups_of(ignore: Sequence[str] = ()) -> tuple[ChannelGroup, ...]:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False)),
        *(nn.Flatten(), nn.Linear(24, 4, bias=False)),
    )
    return find_groups(net, torch.zeros(1, 3, 6, 6), ignore=ignore)


def attention() -> nn.Module:
    return Net(
        lambda n, x: n.out(n.mix(*[n.inner(x)] * 3, need_weights=False)[0]),
        **{"inner": nn.Linear(3, 8), "mix": nn.MultiheadAttention(8, 2, batch_first=True), "out": nn.Linear(8, 5)},
    )


class TestText:
    def test_what_is_tied_to_what(self) -> None:
        assert str(groups_of()).splitlines() == [
            "0: 8 channels, prunable",
            "  0.weight [dim 0]",
            "  0.bias [dim 0]",
            "  1.weight [dim 0]",
            "  1.bias [dim 0]",
            "  3.weight [dim 1]",
            "  1.running_mean [dim 0]",
            "  1.running_var [dim 0]",
            "3: 6 channels, prunable",
            "  3.weight [dim 0]",
            "  5.weight [dim 1, 4 positions a channel]",
            f"5: 4 channels, frozen: {OUT}",
            "  5.weight [dim 0]",
        ]

    def test_why_a_group_is_frozen(self) -> None:
        assert "3: 6 channels, frozen: is ignored by the pattern '5'\n" in str(groups_of(["5"]))

    def test_at_a_prompt_they_show_the_same(self) -> None:
        assert repr(groups_of()) == str(groups_of())

    def test_no_groups_are_no_text(self) -> None:
        assert str(find_groups(nn.ReLU(), torch.zeros(1))) == ""

    def test_channels_that_own_several_positions(self) -> None:
        shown = str(find_groups(attention(), torch.zeros(2, 4, 3)))
        assert "mix: 2 channels, prunable\n  mix.in_proj_weight [dim 0, 12 positions a channel]\n" in shown
        assert "  mix.out_proj.weight [dim 1, 4 positions a channel]" in shown

    def test_they_are_still_a_tuple(self) -> None:
        groups = groups_of()
        assert isinstance(groups, tuple)
        assert [group.name for group in groups] == ["0", "3", "5"]
        assert groups == tuple(groups)
        assert hash(groups) == hash(tuple(groups))


def shown(groups: Sequence[ChannelGroup], width: int = 120) -> list[list[str]]:
    """Print the table and return its rows, cell by cell, the header first."""
    console = Console(record=True, width=width, file=StringIO())
    console.print(describe(groups))
    lines = console.export_text().splitlines()
    return [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if line[0] in "│┃"
    ]


class TestTable:
    def test_a_line_for_each_group(self) -> None:
        assert shown(groups_of(["1"])) == [
            ["group", "channels", "tensors", "layers", "frozen"],
            ["0", "8", "7", "0, 1, 3", "is ignored by the pattern '1'"],
            ["3", "6", "2", "3, 5", ""],
            ["5", "4", "1", "5", OUT],
        ]

    def test_the_title(self) -> None:
        assert describe(groups_of()).title == "Channel groups"

    def test_a_parameter_of_the_model_itself_goes_by_its_own_name(self) -> None:
        class Raw(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w, self.v = nn.Parameter(torch.rand(4, 8)), nn.Parameter(torch.rand(8, 3))

            def forward(self, x: Tensor) -> Tensor:
                return (x @ self.w).relu() @ self.v

        assert shown(find_groups(Raw(), torch.zeros(2, 4)))[1] == ["w", "8", "2", "w, v", ""]

    def test_no_groups_are_an_empty_table(self) -> None:
        assert describe(()).row_count == 0

    def test_long_reasons_are_folded_in_a_narrow_terminal(self) -> None:
        rows = shown(groups_of(["1"]), width=60)
        assert len(rows) > 4
        assert "".join(row[4] for row in rows[1:-1]).replace(" ", "").startswith("isignoredbythepattern'1'")

    def test_more_groups_are_more_lines(self) -> None:
        assert describe(groups_of()).row_count == 3


def marks(groups: Sequence[ChannelGroup]) -> dict[tuple[int, int], str]:
    """Return (row, column) -> colour of the marks in the picture."""
    from matplotlib.colors import to_hex

    found = {}
    for marked in picture.draw(groups).axes[0].collections:
        for column, row in marked.get_offsets().tolist():
            found[int(row), int(column)] = to_hex(marked.get_facecolor()[0])
    return found


def labels(groups: Sequence[ChannelGroup]) -> tuple[list[str], list[str]]:
    """Return what is written beside the rows and under the columns."""
    axes = picture.draw(groups).axes[0]
    return [label.get_text() for label in axes.get_yticklabels()], [
        label.get_text() for label in axes.get_xticklabels()
    ]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the picture needs matplotlib")
class TestPicture:
    def test_groups_are_rows_and_layers_are_columns(self) -> None:
        assert labels(groups_of()) == (["0  (8)", "3  (6)", "5  (4)"], ["0", "1", "3", "5"])

    def test_a_mark_where_a_layer_holds_channels_of_a_group(self) -> None:
        assert marks(groups_of()) == {
            **{(0, 0): BLUE, (0, 1): BLUE, (0, 2): ORANGE},
            **{(1, 2): BLUE, (1, 3): ORANGE},
            (2, 3): GREY,
        }

    def test_frozen_groups_are_grey_with_the_reason(self) -> None:
        axes = picture.draw(groups_of(["1"])).axes[0]
        assert [text.get_text().strip() for text in axes.texts] == ["is ignored by the pattern '1'", OUT]
        assert {colour for (row, _), colour in marks(groups_of(["1"])).items() if row != 1} == {GREY}
        assert len(axes.patches) == 2

    def test_the_legend_tells_the_marks(self) -> None:
        legend = picture.draw(groups_of()).axes[0].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == [
            "channels along dimension 0",
            "channels along another dimension",
        ]

    def test_layers_stand_in_the_order_of_the_model(self) -> None:
        net = Net(
            lambda n, x: n.z(n.m(n.b(x)) + n.a(x)),
            **{"a": nn.Linear(4, 6), "z": nn.Linear(6, 3), "m": nn.Linear(5, 6), "b": nn.Linear(4, 5)},
        )
        rows, columns = labels(find_groups(net, torch.zeros(2, 4)))
        assert (rows, sorted(columns)) == (["b  (5)", "m  (6)", "z  (3)"], ["a", "b", "m", "z"])

    def test_a_layer_with_a_buffer_of_a_later_width(self) -> None:
        class Scales(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.before = nn.Parameter(torch.rand(8))
                self.register_buffer("behind", torch.rand(12))

        net = Net(
            lambda n, x: n.c(n.b(n.a(x) * n.scales.before) * n.scales.behind),
            **{"a": nn.Linear(4, 8), "scales": Scales(), "b": nn.Linear(8, 12), "c": nn.Linear(12, 3)},
        )
        rows, columns = labels(find_groups(net, torch.zeros(2, 4)))
        assert rows == ["a  (8)", "b  (12)", "c  (3)"]
        assert sorted(columns) == ["a", "b", "c", "scales"]

    def test_attention_is_drawn(self) -> None:
        rows, columns = labels(find_groups(attention(), torch.zeros(2, 4, 3)))
        assert "mix  (2)" in rows
        assert {"inner", "mix", "mix.out_proj", "out"} == set(columns)

    def test_it_is_written_to_a_file(self, tmp_path: Path) -> None:
        picture.draw(groups_of()).savefig(tmp_path / "groups.png")
        assert (tmp_path / "groups.png").read_bytes()[:4] == b"\x89PNG"

    def test_more_groups_and_layers_make_a_larger_picture(self) -> None:
        small, large = picture.draw(groups_of()[:1]), picture.draw(groups_of())
        assert all(large.get_size_inches() > small.get_size_inches())

    def test_a_picture_of_nothing(self) -> None:
        assert labels(()) == ([], [])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"drawn with matplotlib: pip install 'lightning-prune\[draw\]'\.$"):
        picture.draw(groups_of())
