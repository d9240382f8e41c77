"""A criterion scores channels; here is what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.errors import ScoreError
from lightning_prune.tensors import named_tensors
from lightning_prune.types import ChannelGroup, Member


class Criterion(ABC):
    """The rule that scores channels."""

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[None]:
        """Surround the scoring of all groups of a model: what they share can be kept in the meantime."""
        yield

    @abstractmethod
    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Score the channels of a group.

        Returns:
            A tensor of shape (size,), higher = keep; or None where the rule has nothing to say about the group.
        """


def gather(along: Tensor, member: Member) -> Tensor:
    """Sum values that lie along a member's dimension over the positions of each channel.

    Args:
        along: A tensor of shape (n,), n being the size of the member's dimension.
        member: Whose channels are meant.

    Returns:
        A tensor of shape (size,).
    """
    positions = member.positions.to(along.device)
    if positions.shape[1] == 1:
        return along.index_select(0, positions.squeeze(1))
    return along[positions].sum(1)


def score_groups(criterion: Criterion, model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """Score all groups that are not frozen; a group that the criterion passes over is left out.

    Returns:
        Group name -> scores on the CPU, float64, of shape (size,).

    Raises:
        ScoreError: A score, or a weight, is NaN or infinite; the layer is named.
    """
    free = [group for group in groups if not group.frozen]
    tensors = named_tensors(model)
    scores = {}
    with torch.no_grad():
        names = dict.fromkeys(member.tensor for group in free for member in group.members)
        for name in _suspicious({name: tensors[name] for name in names}):
            if not tensors[name].isfinite().all():
                raise ScoreError(_nothing_cut(f"{name} holds NaN or infinite values"))
        with criterion.scoring(model):
            for group in free:
                raw = criterion.score(model, group)
                if raw is not None:
                    scores[group.name] = _checked(raw, group, criterion)
    return scores


def _suspicious(tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors whose sum is not finite: those that hold such an element, or whose sum overflows."""
    sums: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta:
            sums.setdefault((tensor.device, tensor.dtype), {})[name] = tensor.sum()
    return [
        name
        for alike in sums.values()
        for name, finite in zip(alike, torch.stack(list(alike.values())).isfinite().tolist(), strict=True)
        if not finite
    ]


def _checked(raw: Tensor, group: ChannelGroup, criterion: Criterion) -> Tensor:
    rule = type(criterion).__name__
    if raw.shape != (group.size,):
        raise ScoreError(
            f"{rule} gave scores of shape {tuple(raw.shape)} for {group.name}, which has {group.size} channels; "
            "a criterion returns one number per channel."
        )
    if raw.is_meta:
        raise ScoreError(f"{rule} reads weights, and those of {group.name} lie on the meta device; use `Random()`.")
    if not raw.isfinite().all():
        raise ScoreError(_nothing_cut(f"{rule} gave NaN or infinite scores for {group.name}"))
    return raw.detach().to("cpu", torch.float64)


def _nothing_cut(cause: str) -> str:
    return (
        f"{cause}. Nothing was cut. Look for a diverging loss before the prune event: lower the learning rate or clip."
    )
