"""The quick half of benchmarks/zoo.py: small models of many families are proven, and cut in half."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import zoo_one
from zoo_models import Choice, choices

MODELS = {
    "torchvision": {
        *("mnasnet0_75", "mobilenet_v3_small", "regnet_x_400mf", "shufflenet_v2_x0_5", "squeezenet1_1"),
        *("swin_t", "swin_v2_t", "vit_b_32"),
    },
    "timm": {
        *("convit_tiny", "cspnext_tiny", "dla46x_c", "edgenext_xx_small", "efficientvit_m0", "fastvit_t8"),
        *("ghostnet_050", "gmlp_ti16_224", "iformer_t", "levit_128s", "mobilevit_xxs", "pit_ti_224", "pvt_v2_b0"),
        *("repvit_m1", "starnet_s050", "swiftformer_xs", "tiny_vit_5m_224", "vit_tiny_patch16_224"),
        *("vit_tiny_patch16_dinov3_qkvb", "xcit_nano_12_p8_224"),
    },
}
HELD = {"vit_tiny_patch16_dinov3_qkvb"}
"""Its width leaves the model, and its attentions take that width for the one of their heads together."""

CHOICES = [choice for choice in choices() if choice.name in MODELS[choice.library]]


def param(choice: Choice) -> object:
    absent = importlib.util.find_spec(choice.library) is None
    marks = pytest.mark.skipif(absent, reason=f"{choice.library} is not installed")
    return pytest.param(choice, id=str(choice), marks=marks)


every_model = pytest.mark.parametrize("choice", [param(choice) for choice in CHOICES])


def test_the_table_holds_all_of_them() -> None:
    assert {str(choice) for choice in CHOICES} == {
        f"{library}/{name}" for library, own in MODELS.items() for name in own
    }


@every_model
def test_permuting_the_channels_leaves_the_output_unchanged(choice: Choice) -> None:
    found = zoo_one.proof(choice)
    assert found["error"] < 1e-10
    assert found["spread"] > 0.1
    assert found["sensitive"] == 1
    assert found["groups"] >= 8


@every_model
def test_half_of_the_channels_goes(choice: Choice) -> None:
    found = zoo_one.cut(choice)
    assert found["channels"] > 0.4
    assert found["macs"] > (0.25 if choice.name in HELD else 0.4)
    assert zoo_one.frozen(choice)["wanting"] == 0
