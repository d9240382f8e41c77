"""Random shifts and flips, for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class ShiftAndFlip:
    """Moves each image by up to `shift` pixels in both directions and mirrors every second one.

    Source: the augmentation of He et al. 2015, "Deep residual learning for image recognition", section 4.2.

    Attributes:
        shift: Greatest move, in pixels, 0 or more.
        flip: Whether images are mirrored left to right with probability 1/2.
    """

    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"`shift` is the greatest move in pixels, 0 or more; got {self.shift}.")

    def __call__(self, images: Tensor, black: Tensor, generator: Generator) -> Tensor:
        """Augment one batch.

        Args:
            images: (batch, channels, h, w).
            black: (channels, 1, 1), what comes in from outside the image.
            generator: A CPU generator; all randomness comes from it.
        """
        moves = torch.randint(-self.shift, self.shift + 1, (len(images), 2), generator=generator)
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        if self.shift:
            images = shifted(images, moves.to(images.device), black=black.to(images.device))
        if self.flip:
            images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)
        return images


def shifted(images: Tensor, moves: Tensor, *, black: Tensor) -> Tensor:
    """Move each image up and left.

    Args:
        images: (batch, channels, h, w).
        moves: Integers (batch, 2): pixels up and left, negative for down and right.
        black: (channels, 1, 1), what comes in from outside the image.
    """
    batch, channels, height, width = images.shape
    reach = int(moves.abs().max())
    padded = F.pad(images - black, [reach] * 4) + black
    place = torch.arange(max(height, width), device=images.device) + reach
    rows = place[:height] + moves[:, :1]
    columns = place[:width] + moves[:, 1:]
    image = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
