"""How the report writes numbers and names."""

from __future__ import annotations

import math
from html import escape

from lightning_prune.sweeps.groups import Spread


def count(number: float) -> str:
    """Write a count; a large one in three digits and a unit.

    >>> count(11_689_512), count(2048), count(999_999)
    ('11.7 M', '2048', '1 M')
    """
    if number < 1e4:
        return f"{number:.4g}"
    rounded = float(f"{number:.3g}")
    size, unit = next(item for item in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if rounded >= item[0])
    return f"{rounded / size:.3g} {unit}"


def cost(name: str, value: float) -> str:
    """Write a cost with its unit.

    >>> cost("macs", 5e6), cost("batch_1", 0.1307)
    ('5 M', '0.131 ms')
    """
    return count(value) if name in ("macs", "params") else f"{value:.3g} ms"


def cost_spread(name: str, found: Spread) -> str:
    """Write the mean of a cost without its unit, and the spread of a time: in two digits, as the mean is then.

    >>> cost_spread("batch_1", Spread(2.9, 0.2134, 3)), cost_spread("macs", Spread(5e6, 1e4, 3))
    ('2.90 ± 0.21', '5 M')
    """
    if name in ("macs", "params") or not found.std:
        return cost(name, found.mean).removesuffix(" ms")
    digits = max(0, 1 - math.floor(math.log10(found.std)))
    return f"{found.mean:.{digits}f} ± {found.std:.{digits}f}"


def cost_name(name: str) -> str:
    """Name a cost.

    >>> cost_name("macs"), cost_name("batch_64")
    ('MACs', 'latency, batch 64')
    """
    known = {"macs": "MACs", "params": "parameters"}
    return known.get(name) or f"latency, {name.replace('_', ' ')}"


def cost_heading(name: str) -> str:
    """Name a cost in few letters.

    >>> cost_heading("params"), cost_heading("batch_64")
    ('params', 'ms, batch 64')
    """
    known = {"macs": "MACs", "params": "params"}
    return known.get(name) or f"ms, {name.replace('_', ' ')}"


def percent(share: float) -> str:
    """Write a share.

    >>> percent(0.30001)
    '30.0 %'
    """
    return f"{100 * share:.1f} %"


def accuracy(share: float) -> str:
    """Write an accuracy.

    >>> accuracy(0.97129)
    '97.13 %'
    """
    return f"{100 * share:.2f} %"


def accuracy_spread(found: Spread) -> str:
    """Write the mean of accuracies and their spread.

    >>> accuracy_spread(Spread(0.97, 0.0041, 3)), accuracy_spread(Spread(0.97, None, 1))
    ('97.00 ± 0.41 %', '97.00 %')
    """
    return accuracy(found.mean) if found.std is None else f"{100 * found.mean:.2f} ± {100 * found.std:.2f} %"


def plain(words: str) -> str:
    """Write words so that Plotly shows them as they are: it would read tags, and formulas between dollars.

    >>> plain("<b>$x$")
    '&lt;b&gt;&#36;x&#36;'
    """
    return escape(words, quote=False).replace("$", "&#36;")


def short(value: str) -> str:
    """Write a setting; of a long number four digits.

    >>> short("0.6939321535345924"), short("resnet20"), short("0.3")
    ('0.6939', 'resnet20', '0.3')
    """
    try:
        return f"{float(value):.4g}" if len(value) > 8 and "." in value else value
    except ValueError:
        return value
