"""Resumes a run where a layer is first called: what was computed before is kept, and not computed again.

While one layer after the other is refitted, all that lies before the layer at hand gives the same in each pass. The
first run on inputs of some shapes is recorded. In later ones the operations before a place F are not done: what is
still read at or after F is handed out as it was kept, for all else stands a tensor whose memory nobody touches. Each
run is held against the recording; one that does anything else is not resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload

from lightning_prune.inputs import Inputs, flat_tensors, tensors_in
from lightning_prune.reconstruction.observer import See, observe
from lightning_prune.reconstruction.recording import Back, New, Recorder, Recording, Run, Step
from lightning_prune.tensors import named_tensors

aten = torch.ops.aten

MOST_BYTES = 2**30
"""What is kept of all batches and networks together takes no more."""


class Astray(BaseException):
    """Ends a resumed run that does something else than was noted; no handler of the network's own is to catch it."""


@dataclass(frozen=True)
class _Kept:
    """What is left of a run at a place in it.

    Attributes:
        network: The network; held, so that its id stays.
        recording: What the run does.
        at: The place.
        tensors: Number -> the tensors that are read there or later, as they were there.
        versions: Name -> version of those of the network's tensors that were read before.
    """

    network: nn.Module
    recording: Recording
    at: int
    tensors: Mapping[int, Tensor]
    versions: Mapping[str, int]

    @property
    def own(self) -> list[UntypedStorage]:
        """The memory that it takes; the network's and the inputs' is theirs."""
        return [
            tensor.untyped_storage()
            for number, tensor in self.tensors.items()
            if self.recording.memory[number] is not None
        ]

    def is_fresh(self) -> bool:
        """Tell whether nothing was written since into what had been read."""
        return self.versions == _versions(self.network, self.recording, self.at)


def _versions(network: nn.Module, recording: Recording, at: int) -> dict[str, int]:
    tensors = named_tensors(network)
    return {name: tensors[name]._version for name, first in recording.first_read.items() if first < at}


def _nbytes(storages: Iterable[UntypedStorage]) -> int:
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _Replay(Run):
    """Does what a run is known to do, from a place on for which tensors were kept; keeps those of a later place.

    Args:
        network: The network.
        inputs: What it is called with.
        recording: What it does.
        kept: What was kept of an earlier run; None computes everything.
        keep_at: The place at which tensors are kept.
        fits: Tells whether there is room for some memory.

    Attributes:
        found: What was kept at that place; None where there was no room.
        is_astray: Whether it has done something else; where nothing was left out, that does no harm.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Inputs,
        recording: Recording,
        kept: _Kept | None,
        keep_at: int,
        fits: Callable[[_Kept], bool],
    ) -> None:
        super().__init__(network, inputs)
        self._network, self._recording, self._fits = network, recording, fits
        self._kept, self._from, self._keep_at = kept, kept.at if kept is not None else 0, keep_at
        self._place = 0
        self._given: dict[int, Tensor] = {}
        self._live = recording.live(keep_at)
        self._held: dict[int, Tensor] = {}
        self.found: _Kept | None = None
        self.is_astray = False

    def starts(self, name: str) -> None:
        if self._place < self._recording.starts[name]:
            self._stray()

    def __call__(self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.is_astray:
            return op(*args, **kwargs)
        if self._place == 0 and self._kept is not None:
            self._given = _twins(self._kept.tensors, self._recording.spoiled(self._from))
        if self._place == self._keep_at > self._from:
            self._keep()
        tensors = flat_tensors((*args, *kwargs.values()))
        step = self._step(op, args, kwargs, tensors)
        if step is None:
            return op(*args, **kwargs)
        out = op(*args, **kwargs) if self._place >= self._from else self._skipped(step, tensors)
        if self._place < self._keep_at or self._place >= self._from:
            self._take(step, out)
        self._place += 1
        return out

    def _step(
        self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[Tensor]
    ) -> Step | None:
        """Return the step that was noted, if this is the same."""
        step = self._recording.steps[self._place] if self._place < len(self._recording.steps) else None
        call = self.called(op, args, kwargs, tensors)
        if step is None or call != step.call:
            self._stray()
            return None
        constants = [tensor for tensor, origin in zip(tensors, call.origins, strict=True) if origin is None]
        if not all(map(_is_same, constants, step.constants)):
            self._stray()
            return None
        return step

    def _stray(self) -> None:
        self.is_astray = True
        if self._from:
            raise Astray

    def _skipped(self, step: Step, tensors: list[Tensor]) -> Any:
        """Return what an operation has given, or what stands for it."""
        values: list[Any] = []
        for result in step.results:
            if isinstance(result, New):
                values.append(self._given.pop(result.number) if result.number in self._given else result.blank())
            else:
                values.append(tensors[result.place] if isinstance(result, Back) else result)
        return values[0] if step.form is None else step.form(values)

    def _take(self, step: Step, out: Any) -> None:
        """Number what an operation returned, and hold what is to be kept."""
        for result, value in zip(step.results, (out,) if step.form is None else out, strict=True):
            if isinstance(result, New):
                self.number(value, result.number)
                if result.number in self._live and self._place < self._keep_at:
                    self._held[result.number] = value

    def _keep(self) -> None:
        at, recording = self._keep_at, self._recording
        candidate = _Kept(self._network, recording, at, self._held, _versions(self._network, recording, at))
        if self._held.keys() == self._live and self._fits(candidate):
            twins = _twins(self._held, recording.spoiled(at))
            self.found = _Kept(self._network, recording, at, twins, candidate.versions)
        self._held = {}


def _is_same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)


def _twins(tensors: Mapping[int, Tensor], copied: Collection[int]) -> dict[int, Tensor]:
    """Return tensors that lie in the same memory; some of them in a copy of it, which they share as they did."""
    copies: dict[int, UntypedStorage] = {}
    twins: dict[int, Tensor] = {}
    for number, tensor in tensors.items():
        twins[number] = aten.alias.default(tensor)
        if number in copied:
            storage = tensor.untyped_storage()
            if storage._cdata not in copies:
                copies[storage._cdata] = storage.clone()
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            twins[number] = empty.set_(copies[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
    return twins


class Resuming:
    """Keeps of each batch and network what the next layers need of the layers before.

    Args:
        layers: Names of the layers at which runs may be resumed.
        most: So many bytes are kept at most; where there is no room, more is computed.

    Attributes:
        nbytes: The most that was kept at a time.
        refusal: Why runs are not resumed any more; empty as long as they are.
    """

    def __init__(self, layers: Collection[str], most: int = MOST_BYTES) -> None:
        self._layers, self._most = layers, most
        self._recordings: dict[Any, Recording] = {}
        self._kept: dict[tuple[int, int], _Kept] = {}
        self.nbytes, self.refusal = 0, ""

    def stop(self, reason: str) -> None:
        """Resume no run any more, and forget what was kept."""
        self.refusal = reason
        self._kept.clear()

    def record(self, network: nn.Module, inputs: Inputs, see: See) -> Recording:
        """Run a network to the end, show each call of a layer, and note what is done."""
        recorder = Recorder(network, inputs)
        observe(network, inputs, see, self._layers, (), None, recorder)
        recording = self._recordings[_likeness(network, inputs)] = recorder.recording
        if recording.refusal:
            self.stop(recording.refusal)
        return recording

    def observe(
        self,
        network: nn.Module,
        inputs: Inputs,
        batch: int,
        see: See,
        layers: Collection[str],
        summed: Collection[str],
        calls: int,
    ) -> None:
        """Do what `observe` does, from where an earlier run with the same batch was left.

        Raises:
            Astray: The run was resumed and did something else; what was shown does not count, and the next is whole.
        """
        recording = self._recording(network, inputs)
        if recording is None or not recording.starts.keys() >= set(layers):
            return observe(network, inputs, see, layers, summed, calls)
        first = min(recording.starts[name] for name in layers)
        kept = self._fresh(network, batch, first)
        expected: list[str] = []
        if kept is not None and not recording.is_checked:
            self._run(network, inputs, batch, recording, kept, first, _Signing(expected), layers, (), calls)
            kept = None
        signing = _Signing([], see)
        shown = signing if expected else see
        self._run(network, inputs, batch, recording, kept, first, shown, layers, summed, calls)
        if expected:
            recording.is_checked = True
            if signing.seen != expected:
                self.stop("a resumed run gave something else")
        return None

    def _run(
        self,
        network: nn.Module,
        inputs: Inputs,
        batch: int,
        recording: Recording,
        kept: _Kept | None,
        first: int,
        see: See,
        layers: Collection[str],
        summed: Collection[str],
        calls: int,
    ) -> None:
        key = (id(network), batch)
        others = [storage for other, held in self._kept.items() if other != key for storage in held.own]

        def fits(candidate: _Kept) -> bool:
            return _nbytes([*others, *candidate.own]) <= self._most

        replay = _Replay(network, inputs, recording, kept, first, fits)
        try:
            observe(network, inputs, see, layers, summed, calls, replay)
        except Astray:
            self.stop("a resumed run did something else")
            raise
        except Exception as error:
            if kept is None:
                raise
            self.stop(f"a resumed run failed: {error}")
            raise Astray from error
        if replay.is_astray:
            self.stop("a run did something else")
        elif replay.found is not None:
            self._kept[key] = replay.found
            self.nbytes = max(self.nbytes, _nbytes([*others, *replay.found.own]))

    def _recording(self, network: nn.Module, inputs: Inputs) -> Recording | None:
        if self.refusal:
            return None
        recording = self._recordings.get(_likeness(network, inputs))
        if recording is None:
            recording = self.record(network, inputs, _look_away)
        return None if recording.refusal else recording

    def _fresh(self, network: nn.Module, batch: int, first: int) -> _Kept | None:
        """Return what was kept, unless that is behind the first layer of interest or no longer true."""
        kept = self._kept.get((id(network), batch))
        return kept if kept is not None and kept.at <= first and kept.is_fresh() else None

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Let what was kept of a network count for a copy of it, as far as nothing was changed that it stems from."""
        ours, theirs = named_tensors(new), named_tensors(old)
        for (network, batch), kept in list(self._kept.items()):
            if network == id(old) and kept.is_fresh():
                same = [name in ours and _is_same(ours[name], theirs[name]) for name in kept.versions]
                if all(same) and _sizes(new) == _sizes(old):
                    versions = _versions(new, kept.recording, kept.at)
                    self._kept[id(new), batch] = _Kept(new, kept.recording, kept.at, kept.tensors, versions)

    def forget(self, but: Collection[nn.Module]) -> None:
        """Forget what was kept of all networks but some."""
        stay = {id(network) for network in but}
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] in stay}


def _look_away(name: str, call: int, inputs: Tensor, output: Tensor, beside: Tensor | None) -> None:
    return None


class _Signing:
    """Takes down what layers read, bit for bit, and passes it on."""

    def __init__(self, seen: list[str], see: See = _look_away) -> None:
        self.seen, self._see = seen, see

    def __call__(self, name: str, call: int, inputs: Tensor, output: Tensor, beside: Tensor | None) -> None:
        bits = inputs.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        self.seen.append(f"{name} {call} {tuple(inputs.shape)} {hashlib.blake2b(bits).hexdigest()}")
        self._see(name, call, inputs, output, beside)


def _likeness(network: nn.Module, inputs: Inputs) -> Any:
    """Return what is the same for runs that do the same."""
    return type(network), _sizes(network), _shapes(tensors_in((inputs.args, dict(inputs.kwargs))))


def _sizes(network: nn.Module) -> Any:
    tensors = named_tensors(network)
    return tuple(tensors), _shapes(tensors.values())


def _shapes(tensors: Iterable[Tensor]) -> Any:
    return tuple([(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors])
