"""What a scan found: thresholds, files that are read strictly, tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from rich.console import Console
from scans import conv_net, images

from lightning_prune.errors import PruningError
from lightning_prune.masks.allocations import PerLayer
from lightning_prune.masks.magnitude import magnitude_masks
from lightning_prune.sensitivity import Row, Sensitivity, sensitivity
from lightning_prune.sensitivity.heatmap import colour

WHITE, DARK = (255, 255, 255), (165, 0, 38)


def scan_of(*lines: tuple[float | None, ...], better: Any = "higher", dense: float = 0.9) -> Sensitivity:
    ratios = tuple((place + 1) / 5 for place in range(len(lines[0])))
    rows = tuple(Row(f"layer{place}", 10 * place + 10, {"metric": line}) for place, line in enumerate(lines))
    return Sensitivity("weights", ratios, {"metric": dense}, {"metric": better}, rows, {"head": "frozen: by hand"})


class TestThresholds:
    def test_by_hand(self) -> None:
        scan = scan_of((0.9, 0.88, 0.5), (0.95, 0.9, 0.9), (0.7, 0.9, 0.9), (0.9, None, 0.9), (None, 0.9, 0.9))
        expected = {"layer0": 0.3, "layer1": 0.6, "layer2": 0.01, "layer3": 0.2, "layer4": 0.0}
        assert scan.thresholds(0.01) == pytest.approx(expected)

    def test_where_lower_is_better(self) -> None:
        scan = scan_of((0.5, 1.5), (0.1, 0.2), better="lower", dense=0.5)
        assert scan.thresholds(0.5) == pytest.approx({"layer0": 0.3, "layer1": 0.4})

    def test_no_drop_at_all(self) -> None:
        assert scan_of((0.9, 0.8), (1.0, 0.9), (0.8, 0.9)).thresholds(0) == {"layer0": 0.2, "layer1": 0.4, "layer2": 0}

    def test_the_most_sensitive_layer_gives_least(self) -> None:
        chosen = scan_of((0.89, 0.85, 0.7), (0.87, 0.6, 0.1), (0.9, 0.9, 0.88)).thresholds(0.02)
        assert sorted(chosen, key=lambda layer: chosen[layer]) == ["layer1", "layer0", "layer2"]

    @pytest.mark.parametrize("drop", [-0.1, float("nan"), float("inf")])
    def test_drops_that_are_none(self, drop: float) -> None:
        with pytest.raises(ValueError, match="`drop` is how much worse the metric may get"):
            scan_of((0.9,)).thresholds(drop)

    def test_an_unknown_metric(self) -> None:
        with pytest.raises(ValueError, match="`metric` is one that was measured, metric; got 'acc'"):
            scan_of((0.9,)).thresholds(metric="acc")

    def test_they_are_ratios_for_per_layer(self) -> None:
        net = conv_net()
        chosen = sensitivity(net, images(), (0.3, 0.6, 0.9)).thresholds(0.1)
        masks = magnitude_masks(net, 0.5, allocation=PerLayer(chosen))
        gone = {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}
        assert gone == pytest.approx({f"{layer}.weight": ratio for layer, ratio in chosen.items()}, abs=0.03)

    def test_odd_names_match_themselves_alone(self) -> None:
        scan = replace(scan_of((0.9,)), rows=(Row("a[b]*?", 3, {"metric": (0.9,)}),))
        (pattern,) = scan.thresholds()
        assert fnmatchcase("a[b]*?", pattern)
        assert not fnmatchcase("ab!!", pattern)


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        scan = sensitivity(conv_net(), images(), (0.3, 0.6), of="channels")
        scan.save(tmp_path / "scan.json")
        assert Sensitivity.load(tmp_path / "scan.json") == scan
        assert list(Sensitivity.load(tmp_path / "scan.json").dense) == ["accuracy", "loss"]
        assert [path.name for path in tmp_path.iterdir()] == ["scan.json"]
        assert json.loads(scan.to_json())["rows"][0]["layer"] == "0"

    @pytest.mark.parametrize(
        "tamper",
        [
            lambda plain: plain.pop("of"),
            lambda plain: plain.update(more=1),
            lambda plain: plain.update(of="heads"),
            lambda plain: plain.update(of=["weights"]),
            lambda plain: plain.update(ratios=[0.4, 0.2]),
            lambda plain: plain.update(ratios=[0.2]),
            lambda plain: plain.update(ratios=["0.2", 0.4]),
            lambda plain: plain.update(ratios={}),
            lambda plain: plain.update(dense={}),
            lambda plain: plain.update(dense={"metric": True}),
            lambda plain: plain.update(dense={"metric": 10**400}),
            lambda plain: plain.update(better={"metric": "max"}),
            lambda plain: plain.update(better={}),
            lambda plain: plain.update(rows=None),
            lambda plain: plain.update(held_back={"a": 1}),
            lambda plain: plain["rows"].append(plain["rows"][0]),
            lambda plain: plain["rows"][0].update(size=0),
            lambda plain: plain["rows"][0].update(size=1.5),
            lambda plain: plain["rows"][0].update(layer=None),
            lambda plain: plain["rows"][0].update(values={"metric": [0.9]}),
            lambda plain: plain["rows"][0].update(values={"metric": [0.9, "x"]}),
            lambda plain: plain["rows"][0].update(values={"metric": [0.9, float("nan")]}),
            lambda plain: plain["rows"][0].update(values={"other": [0.9, 0.9]}),
            lambda plain: plain["rows"][0].pop("values"),
        ],
    )
    def test_tampered(self, tamper: Callable[[dict[str, Any]], Any]) -> None:
        plain = json.loads(scan_of((0.9, 0.8), (0.9, None)).to_json())
        tamper(plain)
        with pytest.raises(PruningError, match="This is no sensitivity scan"):
            Sensitivity.from_json(json.dumps(plain))

    @pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"of": "weights", "of": "weights"}', "[" * 100_000])
    def test_other_texts(self, text: str) -> None:
        with pytest.raises(PruningError, match="This is no sensitivity scan"):
            Sensitivity.from_json(text)

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "scan.json").write_bytes(b"\xff\xfe")
        with pytest.raises(PruningError, match=r"scan.json: "):
            Sensitivity.load(tmp_path / "scan.json")
        with pytest.raises(FileNotFoundError):
            Sensitivity.load(tmp_path / "none.json")

    def test_parts_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="has not a value of each metric"):
            replace(scan_of((0.9, 0.8)), ratios=(0.5,))


class TestShown:
    def test_the_table(self) -> None:
        console = Console(width=100)
        with console.capture() as shown:
            console.print(scan_of((0.9, 0.88, 0.5), (0.95, None, 12.345)))
        lines = [line.split() for line in shown.get().splitlines()]
        assert ["layer", "size", "20%", "40%", "60%", "0.01"] in lines
        assert ["layer0", "10", "0.900", "0.880", "0.500", "30.0%"] in lines
        assert ["layer1", "20", "0.950", "-", "12.3", "20.0%"] in lines
        assert "metric as one layer alone loses weights; dense 0.900" in " ".join(shown.get().split())
        assert "head: frozen: by hand" in shown.get()

    def test_as_text(self) -> None:
        assert "layer0" in str(scan_of((0.9, 0.88, 0.5)))

    def test_the_picture(self) -> None:
        picture = scan_of((0.9, 0.7, 0.5), (0.95, None, 0.8)).picture()
        assert isinstance(picture, Image.Image)
        assert picture.mode == "RGB"
        found = [[corner(picture, row, column) for column in range(3)] for row in range(2)]
        assert found[0] == [WHITE, colour(0.5), DARK]
        assert found[1] == [WHITE, colour(None), colour(0.25)]

    def test_lower_is_better(self) -> None:
        picture = scan_of((0.9, 1.9), (0.1, 1.4), better="lower").picture()
        assert [corner(picture, 0, 1), corner(picture, 1, 0), corner(picture, 1, 1)] == [DARK, WHITE, colour(0.5)]

    def test_more_layers_and_ratios_make_it_larger(self) -> None:
        small, large = scan_of((0.9, 0.8)).picture().size, scan_of(*[(0.9, 0.8, 0.7, 0.6)] * 3).picture().size
        assert large[1] - small[1] == 2 * 20
        assert large[0] >= small[0]

    def test_nothing_worse_is_all_white(self) -> None:
        picture = scan_of((0.9, 0.95)).picture()
        assert [corner(picture, 0, 0), corner(picture, 0, 1)] == [WHITE, WHITE]

    def test_any_name_can_be_drawn(self) -> None:
        scan = replace(
            scan_of((0.9,)), rows=(Row("größe.層" + "x" * 90, 3, {"metric": (0.9,)}), Row("", 3, {"metric": (1.0,)}))
        )
        assert scan.picture().size[0] < 500
        assert "(model)" in str(scan)


def corner(picture: Image.Image, row: int, column: int) -> Any:
    """Return the colour in the upper left corner of a cell: cells are 48 x 20, below a head of 46."""
    pixels = np.asarray(picture)
    left = 8 * 2 + int(measured("layer0"))
    return tuple(int(part) for part in pixels[46 + 20 * row, left + 48 * column])


def measured(text: str) -> float:
    return ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text)
