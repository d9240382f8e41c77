"""What handlers work with: the labels that tensors carry while a model runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_prune.labels import LabelArray, Labels, LabelSpace
from lightning_prune.rectangles import Rectangle

_LABELS = "_lightning_prune_labels"
_TAINT = "_lightning_prune_taint"


class Flow:
    """What handlers work with: the labels that tensors carry while the model runs.

    Args:
        space: Where labels come from and are tied.

    Attributes:
        made: The labels that operations with weights made, in order.
        unknown: The operations without a handler that labels went into.
        current: The operation that runs, and its arguments: after a failure, the one that failed.
        rectangles: The dimensions that views have split or merged, and that are not settled yet.
        attended: The labels of dimensions that attentions treat one by one.
        marks: The labels of parts of dimensions that went another way than the rest.
        told: While a cut model runs: id -> the shape in the dense model, for what goes in and out of this operation.
    """

    def __init__(self, space: LabelSpace) -> None:
        self.space = space
        self.made: list[LabelArray] = []
        self.unknown: set[str] = set()
        self.current: tuple[str, object] = ("", ())
        self.rectangles: list[Rectangle] = []
        self.attended: list[LabelArray] = []
        self.marks: list[LabelArray] = []
        self.told: dict[int, tuple[int, ...]] = {}
        self._any_taint = False

    @staticmethod
    def of(tensor: Tensor) -> Labels:
        """Read the labels of a tensor."""
        labels: Labels | None = getattr(tensor, _LABELS, None)
        return (None,) * tensor.dim() if labels is None else labels

    @staticmethod
    def put(tensor: Tensor, labels: Sequence[LabelArray | None]) -> None:
        """Give a tensor its labels."""
        setattr(tensor, _LABELS, tuple(labels))

    def dense_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape that a tensor has in the dense model, while a cut one runs; else its own."""
        return self.told.get(id(tensor)) or tuple(tensor.shape)

    @staticmethod
    def is_labelled(tensor: Tensor) -> bool:
        """Tell whether any dimension carries labels, be it of size 1."""
        return any(label is not None for label in getattr(tensor, _LABELS, ()))

    def tie(self, left: LabelArray | None, right: LabelArray | None, where: str) -> None:
        """Tie two dimensions; one that meets a dimension without channels is frozen."""
        if left is not None and right is not None:
            self.space.tie(left, right)
        else:
            self.freeze(left if right is None else right, f"meets a dimension that holds no channels in {where}")

    def freeze(self, labels: LabelArray | None, reason: str) -> None:
        """Freeze the labels of a dimension, if it has any."""
        if labels is not None:
            self.space.freeze(labels, reason)

    def freeze_tensor(self, tensor: Tensor, reason: str) -> None:
        """Freeze all dimensions of a tensor."""
        for labels in self.of(tensor):
            self.freeze(labels, reason)

    def fixed(self, count: int, reason: str) -> LabelArray:
        """Make labels that are frozen from the start, for positions that belong to no channel."""
        labels = self.space.fresh(count)
        self.space.freeze(labels, reason)
        return labels

    def attend(self, labels: LabelArray | None) -> None:
        """Note that an attention treats these positions one by one."""
        if labels is not None:
            self.attended.append(labels)

    def mark(self, part: LabelArray, whole: LabelArray) -> None:
        """Note that some positions of a dimension went another way than the rest."""
        if 0 < len(part) < len(whole):
            self.marks.append(part)

    def make(self, labels: LabelArray | None) -> None:
        """Note that an operation makes these channels: its weights give a group its name."""
        if labels is not None:
            self.made.append(labels)

    def taint(self, tensor: Tensor, labels: LabelArray | None, reason: str) -> None:
        """Mark a tensor that holds channel numbers: the channels freeze as soon as anybody reads it."""
        if labels is not None:
            self._any_taint = True
            setattr(tensor, _TAINT, (labels, reason))

    def read_taint(self, tensor: Tensor) -> None:
        """Freeze what a tainted tensor is about, since it is being used."""
        taint: tuple[LabelArray, str] | None = getattr(tensor, _TAINT, None) if self._any_taint else None
        if taint is not None:
            self.space.freeze(*taint)
