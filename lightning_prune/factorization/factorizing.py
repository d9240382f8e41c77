"""Factorisation on one page: read, decompose, choose ranks, put the factors in."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor, nn

from lightning_prune.chance import random_state_kept
from lightning_prune.cost import count_macs, per_example
from lightning_prune.errors import NothingToPruneError, PruningError, SurgeryError
from lightning_prune.factorization.outputs import watch_outputs
from lightning_prune.factorization.ranks import Menu, choose_ranks
from lightning_prune.factorization.record import KINDS, Factorization, Kind
from lightning_prune.factorization.spectrum import Spectrum, spectrum_of
from lightning_prune.factorization.splitting import (
    Splittable,
    calls_of,
    factors,
    full_rank,
    reasons_against,
    split,
)
from lightning_prune.graph import Graph, check_model, ignored_tensors, read
from lightning_prune.history import history_of
from lightning_prune.inputs import ExampleInputs
from lightning_prune.layers.gates import gates_of
from lightning_prune.masks import masks_of
from lightning_prune.selection import put
from lightning_prune.surgery import together
from lightning_prune.tensors import unwrapped

log = logging.getLogger(__name__)


def factorize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    kind: Kind,
    speed_up: float | None = None,
    ranks: Mapping[str, int] | None = None,
    batches: Iterable[ExampleInputs] | None = None,
    points: int | None = 10,
    ignore: Sequence[str] = (),
) -> Factorization:
    """Replace convolutions by two thinner ones each, an `nn.Sequential` of plain `nn.Conv2d` modules.

    With a weight of shape (n, c, kh, kw) and the rank r:

    - "spatial": c -> r channels with a kernel (kh, 1), then r -> n with (1, kw). W[n, c, y, x] is approximated by
      sum_r V[r, c, y] H[n, r, x], best in the Frobenius norm by the SVD of the weight arranged as (c kh, n kw). After
      Jaderberg, Vedaldi and Zisserman 2014 ("Speeding up convolutional neural networks with low rank expansions",
      scheme 2).
    - "channel": c -> r channels with the whole kernel, then r -> n with a kernel of 1 x 1. W is approximated by U U' W;
      U holds the leading eigenvectors of the covariance of the layer's outputs over `batches`, and the bias
      b + m - U U' m keeps their mean, m that of W x; without batches U is of the SVD of the weight. After Zhang et al.
      2015 ("Accelerating very deep convolutional networks for classification and detection", section 3, the linear
      form).

    They are the first two of the three in "3C" (He, Zhang and Sun 2017, "Channel pruning for accelerating very deep
    neural networks"); `prune` is the third. What stays as it is, with the reason in the record: what is ignored,
    subclasses of `Conv2d`, layers with hooks, shared ones, those with groups, with computed weights, that the forward
    in eval mode does not run, and for "spatial" those with one row or column. Where BatchNorm follows, most of the
    accuracy that is lost comes back with its statistics: see `lightning_prune.calibration.recalibrate`.

    Args:
        model: Any module that was not pruned, masked or gated before; changed in place. Optimizers must be made anew
            afterwards, since the factors have parameters of their own.
        example_inputs: A tensor, a tuple of positional inputs, a dict of keyword inputs, or a whole batch.
        kind: "spatial" or "channel".
        speed_up: The MACs of all layers that can be factorised, together, fall by this factor at least; above 1. Ranks
            are those that keep much of the product of the retained energies (squared singular values, eigenvalues). A
            layer stays whole where two cost no less than one.
        ranks: Name of a layer -> its rank in place of `speed_up`, from 1 to min(c kh, n kw) ("spatial") or
            min(n, c kh kw) ("channel"). No other layer changes; also what saves nothing is done.
        batches: What forward takes, for "channel" only; run in eval mode. Under several processes give each the same.
        points: So many points of each example's map are looked at, at most; None takes all.
        ignore: Patterns of module names that are not to be touched (see `find_groups`).

    Returns:
        What was done; print it. `lay_out` does it again on another model.

    Raises:
        ValueError: An argument is wrong, or there is no layer to factorise.
        TypeError: An argument is of the wrong type.
        PruningError: The model was pruned, masked or gated before, cannot be read, has weights or outputs that are not
            finite, or the speed-up is out of reach; it is unchanged.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        >>> done = factorize(net, torch.zeros(1, 3, 8, 8), kind="spatial", ranks={"2": 8})
        >>> net[2]
        Sequential(
          (0): Conv2d(16, 8, kernel_size=(3, 1), stride=(1, 1), bias=False)
          (1): Conv2d(8, 32, kernel_size=(1, 3), stride=(1, 1))
        )
        >>> done.ranks, done.macs
        ({'2': 8}, {'2': (73728, 21504)})
    """
    check_model(model)
    model = unwrapped(model)
    _check(kind, speed_up, ranks, batches, points)
    _check_untouched(model)
    with random_state_kept(), torch.inference_mode(False), torch.no_grad():
        graph = _read(model, example_inputs, ignore)
        layers, stayed = _splittable(model, graph, kind, ignore)
        chosen = _chosen(layers, stayed, model, ranks)
        spectra = _spectra(model, chosen, kind, batches, points)
        found = _ranks(chosen, spectra, speed_up) if ranks is None else dict(ranks)
        stayed.update({name: "is worth more whole" for name in chosen if name not in found})
        record = _record(graph, chosen, spectra, found, kind, stayed)
        pairs = {name: factors(layers[name].conv, kind, rank, spectra[name]) for name, rank in found.items()}
        with _exchanged(model, pairs):
            _check_macs(model, graph, record)
    log.info("%s", record.headline)
    return record


def lay_out(model: nn.Module, factorization: Factorization) -> None:
    """Give a freshly built dense model the modules of a factorised one, so that its state dict can be loaded.

    Args:
        model: The model, built as the one that was factorised; changed in place. What takes the place of factorised
            layers has new random weights. One that was factorised several times is laid out in the same order.
        factorization: What `factorize` returned.

    Raises:
        TypeError: It is something else.
        PruningError: It does not fit the model, which is unchanged.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        >>> done = factorize(net, torch.zeros(1, 3, 8, 8), kind="channel", speed_up=1.5)
        >>> twin = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        >>> lay_out(twin, done)
        >>> twin.load_state_dict(net.state_dict())
        <All keys matched successfully>
    """
    check_model(model)
    if not isinstance(factorization, Factorization):
        raise TypeError(f"`factorization` is what `factorize` returned; got {type(factorization).__name__}.")
    model, kind = unwrapped(model), factorization.kind
    _check_untouched(model)
    reasons = reasons_against(model, kind)
    pairs: dict[str, nn.Module] = {}
    with torch.inference_mode(False):
        for name, rank in factorization.ranks.items():
            conv = model.get_submodule(name) if name in reasons else None
            reason = reasons.get(name, "is no Conv2d of the model")
            if not isinstance(conv, nn.Conv2d) or reason is not None or not 1 <= rank <= full_rank(conv, kind):
                raise PruningError(
                    f"The factorisation gives {name!r} the {kind} rank {rank}, which does not fit: it "
                    f"{reason or 'has other sizes'}. Build the model with the arguments that it was factorised with."
                )
            bias = conv.bias is not None or name in factorization.biases
            pairs[name] = split(conv, kind, rank, bias=bias)
    put(model, pairs)


def _check(kind: object, speed_up: object, ranks: object, batches: object, points: object) -> None:
    """Look at what is asked."""
    if kind not in KINDS:
        raise ValueError(f"`kind` is one of {', '.join(map(repr, KINDS))}; got {kind!r}.")
    if (speed_up is None) == (ranks is None):
        raise ValueError("Pass `speed_up`, which finds the ranks, or `ranks`: one of them, and not both.")
    if speed_up is not None and not (isinstance(speed_up, (int, float)) and isfinite(speed_up) and speed_up > 1):
        raise ValueError(
            f"`speed_up` is how many times fewer MACs the layers are to have, above 1; got {speed_up!r}. For half of "
            "the MACs pass 2."
        )
    if ranks is not None and not (isinstance(ranks, Mapping) and ranks):
        raise ValueError(f"`ranks` maps names of layers to their ranks, such as {{'conv1': 8}}; got {ranks!r}.")
    if batches is not None and kind == "spatial":
        raise ValueError("`batches` are for kind='channel': spatial factors come from the weights. Leave them out.")
    if isinstance(batches, (Tensor, str)) or not (batches is None or isinstance(batches, Iterable)):
        raise TypeError(f"`batches` is an iterable of batches; got {type(batches).__name__}. Put one batch in a list.")
    if points is not None and not (isinstance(points, int) and points >= 1):
        raise ValueError(f"`points` is how many points of each map are looked at, 1 or more, or None; got {points!r}.")


def _check_untouched(model: nn.Module) -> None:
    """See that nothing is kept with the model under names that factorising would change."""
    if history_of(model):
        raise PruningError(
            "The model has been pruned, and the names in its history would not fit its factors. Factorise a dense "
            "model first and prune it then."
        )
    if gates_of(model) is not None:
        raise PruningError("The model is gated. Take its gates off first: `lightning_prune.gates.fold(model)`.")
    if masks_of(model):
        raise PruningError("The model holds masks, which would not fit its factors. Factorise it before it is masked.")


def _read(model: nn.Module, example_inputs: ExampleInputs, ignore: Sequence[str]) -> Graph:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No handler for")  # only cuts need handlers
        return read(model, example_inputs, ignore)


def _splittable(
    model: nn.Module, graph: Graph, kind: Kind, ignore: Sequence[str]
) -> tuple[dict[str, Splittable], dict[str, str]]:
    """Return the layers that can be split, by name, and why others cannot."""
    calls, ignored = calls_of(graph), ignored_tensors(model, ignore)
    layers: dict[str, Splittable] = {}
    stayed: dict[str, str] = {}
    for name, reason in reasons_against(model, kind).items():
        weight, conv = f"{name}.weight", model.get_submodule(name)
        if weight in ignored:
            stayed[name] = f"is ignored by the pattern {ignored[weight]!r}"
        elif reason is not None or weight not in calls:
            stayed[name] = reason or "is not run by the forward pass"
        elif isinstance(conv, nn.Conv2d):
            layers[name] = Splittable.of(conv, kind, calls[weight])
    return layers, stayed


def _chosen(
    layers: Mapping[str, Splittable], stayed: dict[str, str], model: nn.Module, ranks: Mapping[str, int] | None
) -> dict[str, Splittable]:
    """Return the layers that are asked for, or all that can get cheaper."""
    if ranks is not None:
        for name, rank in ranks.items():
            _check_rank(name, rank, layers, stayed)
        return {name: layers[name] for name in ranks}
    thin = [name for name, layer in layers.items() if layer.per_rank >= layer.whole]
    stayed.update(dict.fromkeys(thin, "is so thin that its factors would cost no less"))
    chosen = {name: layer for name, layer in layers.items() if name not in thin}
    if not chosen:
        reasons = "; ".join(f"{name} {reason}" for name, reason in stayed.items())
        raise NothingToPruneError(
            f"There is no layer to factorise in {type(model).__name__}: {reasons or 'it has no Conv2d'}. Try the other "
            "`kind`, or loosen `ignore`."
        )
    return chosen


def _check_rank(name: str, rank: object, layers: Mapping[str, Splittable], stayed: Mapping[str, str]) -> None:
    if name not in layers:
        raise ValueError(
            f"`ranks` names {name!r}, which cannot be factorised: it {stayed.get(name, 'is no Conv2d of the model')}. "
            f"Layers that can be: {', '.join(layers) or 'none'}."
        )
    most = layers[name].full_rank
    if type(rank) is not int or not 1 <= rank <= most:
        raise ValueError(f"The rank of {name!r} is a whole number from 1 to {most}, where it is exact; got {rank!r}.")


def _spectra(
    model: nn.Module,
    layers: Mapping[str, Splittable],
    kind: Kind,
    batches: Iterable[ExampleInputs] | None,
    points: int | None,
) -> dict[str, Spectrum]:
    convs = {name: layer.conv for name, layer in layers.items()}
    for name, conv in convs.items():
        if conv.weight.is_meta or not all(part.isfinite().all() for part in conv.parameters(recurse=False)):
            raise PruningError(
                f"The weights of {name!r} are not finite, or have no values at all. Load weights into the model that "
                "its training has not driven apart, or put the layer in `ignore`."
            )
    outputs = {} if batches is None else watch_outputs(model, convs, batches, points)
    return {name: spectrum_of(conv, kind, outputs.get(name)) for name, conv in convs.items()}


def _ranks(layers: Mapping[str, Splittable], spectra: Mapping[str, Spectrum], speed_up: float | None) -> dict[str, int]:
    assert speed_up is not None
    menus = {name: Menu.of(layer.whole, layer.per_rank, spectra[name]) for name, layer in layers.items()}
    return choose_ranks(menus, speed_up)


def _record(
    graph: Graph,
    layers: Mapping[str, Splittable],
    spectra: Mapping[str, Spectrum],
    ranks: Mapping[str, int],
    kind: Kind,
    stayed: Mapping[str, str],
) -> Factorization:
    after = {name: layer.per_rank * ranks[name] if name in ranks else layer.whole for name, layer in layers.items()}
    saved = sum(layer.whole - after[name] for name, layer in layers.items())

    def share(macs: int) -> int:
        return per_example(macs, graph.inputs)

    return Factorization(
        kind,
        dict(ranks),
        {name: spectra[name].error(rank) for name, rank in ranks.items()},
        {name: (share(layer.whole), share(after[name])) for name, layer in layers.items()},
        share(graph.macs),
        share(graph.macs - saved),
        dict(stayed),
        tuple(name for name in ranks if layers[name].conv.bias is None and spectra[name].mean is not None),
    )


@contextmanager
def _exchanged(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the places of others; if anything fails meanwhile, these come back."""
    before = {name: model.get_submodule(name) for name in modules}
    with together() as steps:
        steps.append(lambda: put(model, before))
        put(model, modules)
        yield


def _check_macs(model: nn.Module, graph: Graph, record: Factorization) -> None:
    """See that the model runs with its factors, and runs nothing else in their place."""
    try:
        macs = count_macs(model, graph.inputs)
    except Exception as error:
        raise SurgeryError(
            f"The model does not run with factors in place of {', '.join(record.ranks)} ({type(error).__name__}: "
            f"{error}), and is unchanged. Its forward may read their weights: put such layers in `ignore`."
        ) from error
    if macs != record.macs_after:
        raise SurgeryError(
            f"With factors in place of {', '.join(record.ranks)} the model runs {macs:,} MACs instead of "
            f"{record.macs_after:,}, and is unchanged. It may hold one of these layers in a second place, such as a "
            "list: put that in `ignore`."
        )
