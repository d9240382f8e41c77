"""Networks for segmentation and detection: torchvision's, a U-Net, and YOLO with the code of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection, resnet18, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

CLASSES = 5

# U-Net, as in the paper of 2015: no padding, so that what skips is cropped


class DoubleConv(nn.Sequential):
    def __init__(self, inner: int, outer: int) -> None:
        parts = [(nn.Conv2d(a, outer, 3, bias=False), nn.BatchNorm2d(outer), nn.ReLU(True)) for a in (inner, outer)]
        super().__init__(*parts[0], *parts[1])


class UNet(nn.Module):
    def __init__(self, widths: Sequence[int] = (8, 16, 32)) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.stem = DoubleConv(3, widths[0])
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in pairs)
        self.lift = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs[::-1])
        self.up = nn.ModuleList(DoubleConv(2 * a, a) for a, _ in pairs[::-1])
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for lift, up in zip(self.lift, self.up, strict=True):
            x = lift(x)
            x = up(torch.cat([self.crop(skips.pop(), x), x], dim=1))
        return self.head(x)

    @staticmethod
    def crop(skip: Tensor, like: Tensor) -> Tensor:
        top, left = ((skip.shape[dim] - like.shape[dim]) // 2 for dim in (2, 3))
        return skip[:, :, top : top + like.shape[2], left : left + like.shape[3]]


class PaddedUNet(UNet):
    """The other common way: what was lifted is padded to the size of what skips."""

    @staticmethod
    def crop(skip: Tensor, like: Tensor) -> Tensor:
        rows, columns = like.shape[2] - skip.shape[2], like.shape[3] - skip.shape[3]
        return F.pad(skip, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])


# YOLO


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, *, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c2, 3), Conv(c2, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """The input's halves and all that the bottlenecks make of the second, strung together."""

    def __init__(self, c1: int, c2: int, n: int = 1, *, shortcut: bool = False) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, 2 * self.c), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c, self.c, shortcut=shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SplitC2f(C2f):
    """The same by a split with the size written out."""

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C3(nn.Module):
    """A cross stage partial block."""

    def __init__(self, c1: int, c2: int, n: int = 1, *, shortcut: bool = False) -> None:
        super().__init__()
        c_ = c2 // 2
        self.cv1, self.cv2, self.cv3 = Conv(c1, c_), Conv(c1, c_), Conv(2 * c_, c2)
        self.m = nn.Sequential(*(Bottleneck(c_, c_, shortcut=shortcut) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(c1 // 2 * 4, c2)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class DFL(nn.Module):
    """The expectation of a distribution over distances, as a convolution with a fixed weight 0, 1, 2, ..."""

    def __init__(self, c1: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)
        self.c1 = c1

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


STRIDES = (4, 8, 16)
PIXELS = 64


def make_anchors(shapes: Sequence[tuple[int, int]], strides: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    points, of_stride = [], []
    for (h, w), stride in zip(shapes, strides, strict=True):
        sy, sx = torch.meshgrid(torch.arange(h, dtype=dtype) + 0.5, torch.arange(w, dtype=dtype) + 0.5, indexing="ij")
        points.append(torch.stack((sx, sy), -1).view(-1, 2))
        of_stride.append(torch.full((h * w, 1), stride, dtype=dtype))
    return torch.cat(points).transpose(0, 1), torch.cat(of_stride).transpose(0, 1)


class Detect(nn.Module):
    """YOLOv8's head: boxes from distributions of distances; anchors and strides lie in buffers."""

    reg_max = 4

    def __init__(self, ch: Sequence[int]) -> None:
        super().__init__()
        self.nc, self.nl, self.no = CLASSES, len(ch), CLASSES + 4 * self.reg_max
        c2, c3 = max(8, ch[0] // 2, 4 * self.reg_max), max(ch[0], self.nc)
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(x, c2, 3), Conv(c2, c2, 3), nn.Conv2d(c2, 4 * self.reg_max, 1)) for x in ch
        )
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(x, c3, 3), Conv(c3, c3, 3), nn.Conv2d(c3, self.nc, 1)) for x in ch)
        self.dfl = DFL(self.reg_max)
        self.register_buffer("stride", torch.tensor([float(stride) for stride in STRIDES]))
        sizes = [(PIXELS // stride, PIXELS // stride) for stride in STRIDES]
        for name, table in zip(("anchors", "strides"), make_anchors(sizes, STRIDES, torch.float32), strict=True):
            self.register_buffer(name, table)

    def forward(self, x: list[Tensor]) -> Any:
        x = [torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1) for i in range(self.nl)]
        return x if self.training else [self.decode(x), x]

    def decode(self, x: list[Tensor]) -> Tensor:
        flat = torch.cat([part.view(x[0].shape[0], self.no, -1) for part in x], 2)
        box, cls = flat.split((4 * self.reg_max, self.nc), 1)
        lt, rb = self.dfl(box).chunk(2, 1)
        x1y1, x2y2 = self.anchors.unsqueeze(0) - lt, self.anchors.unsqueeze(0) + rb
        return torch.cat((torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), 1) * self.strides, cls.sigmoid()), 1)


class CachingDetect(Detect):
    """The same, but anchors are made in the first forward pass and kept, as ultralytics does."""

    def __init__(self, ch: Sequence[int]) -> None:
        super().__init__(ch)
        del self.anchors, self.strides
        self.shape: tuple[int, ...] | None = None
        self.anchors, self.strides = torch.empty(0), torch.empty(0)

    def decode(self, x: list[Tensor]) -> Tensor:
        if self.shape != x[0].shape:
            shapes = [tuple(part.shape[2:]) for part in x]
            self.anchors, self.strides = make_anchors(shapes, self.stride, x[0].dtype)
            self.shape = x[0].shape
        return super().decode(x)


class AnchorDetect(nn.Module):
    """YOLOv5's head: a few anchors at each place, and a view of (anchor, what is told of it)."""

    def __init__(self, ch: Sequence[int]) -> None:
        super().__init__()
        self.nc, self.na, self.no = CLASSES, 3, CLASSES + 5
        self.register_buffer("stride", torch.tensor([float(stride) for stride in STRIDES]))
        self.register_buffer("anchors", torch.rand(len(ch), self.na, 2) + 0.5)
        self.m = nn.ModuleList(nn.Conv2d(x, self.no * self.na, 1) for x in ch)

    def forward(self, x: list[Tensor]) -> Any:
        raw, decoded = [], []
        for i, layer in enumerate(self.m):
            bs, _, ny, nx = x[i].shape
            raw.append(layer(x[i]).view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous())
            sy, sx = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
            grid = torch.stack((sx, sy), 2).expand(1, self.na, ny, nx, 2).to(raw[i].dtype) - 0.5
            xy, wh, conf = raw[i].sigmoid().split((2, 2, self.nc + 1), 4)
            size = (self.anchors[i] * self.stride[i]).view(1, self.na, 1, 1, 2)
            y = torch.cat(((xy * 2 + grid) * self.stride[i], (wh * 2) ** 2 * size, conf), 4)
            decoded.append(y.view(bs, self.na * nx * ny, self.no))
        return raw if self.training else (torch.cat(decoded, 1), raw)


class YOLO(nn.Module):
    """Backbone, SPPF, a path up, a path down again (PAN), and the head on three scales."""

    def __init__(self, block: Callable[..., nn.Module], detect: Callable[[Sequence[int]], nn.Module]) -> None:
        super().__init__()
        a, b, c, d = 8, 16, 32, 64
        self.stem = nn.Sequential(Conv(3, a, 3, 2), Conv(a, b, 3, 2), block(b, b, 1, shortcut=True))
        self.stage1 = nn.Sequential(Conv(b, c, 3, 2), block(c, c, 2, shortcut=True))
        self.stage2 = nn.Sequential(Conv(c, d, 3, 2), block(d, d, 1, shortcut=True), SPPF(d, d))
        self.upsample = nn.Upsample(None, 2, "nearest")
        self.up1, self.up2 = block(d + c, c), block(c + b, b)
        self.down1, self.down2 = Conv(b, b, 3, 2), Conv(c, c, 3, 2)
        self.out1, self.out2 = block(b + c, c), block(c + d, d)
        self.detect = detect((b, c, d))

    def forward(self, x: Tensor) -> Any:
        p3 = self.stem(x)
        p4 = self.stage1(p3)
        p5 = self.stage2(p4)
        n4 = self.up1(torch.cat([self.upsample(p5), p4], 1))
        n3 = self.up2(torch.cat([self.upsample(n4), p3], 1))
        m4 = self.out1(torch.cat([self.down1(n3), n4], 1))
        return self.detect([n3, m4, self.out2(torch.cat([self.down2(m4), p5], 1))])


# torchvision


class Features(nn.Module):
    """The part of a detector that has fixed shapes: the backbone, and the head on all that it returns."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, images: Tensor) -> Any:
        return self.head(list(self.backbone(images).values()))


class BoxHead(nn.Module):
    """What Faster R-CNN does with the features of each box."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.head, self.predictor = detector.roi_heads.box_head, detector.roi_heads.box_predictor

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictor(self.head(features))


def fcn() -> nn.Module:
    backbone = IntermediateLayerGetter(resnet18(), {"layer4": "out", "layer3": "aux"})
    return segmentation.FCN(backbone, FCNHead(512, CLASSES), FCNHead(256, CLASSES))


def retinanet() -> nn.Module:
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(resnet18(), layers, [128, 256, 512], 32, LastLevelP6P7(32, 32))
    anchors = AnchorGenerator(tuple((size, size * 2) for size in (8, 16, 32, 64, 128)), ((0.5, 1.0, 2.0),) * 5)
    return detection.RetinaNet(
        backbone, CLASSES, PIXELS, PIXELS, anchor_generator=anchors, score_thresh=0.0, topk_candidates=20
    )


UNTRAINED = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}


def fasterrcnn() -> nn.Module:
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        **UNTRAINED, min_size=128, box_score_thresh=0.0, rpn_score_thresh=0.0
    )


def ssdlite() -> nn.Module:
    return detection.ssdlite320_mobilenet_v3_large(**UNTRAINED, score_thresh=0.0)


def image(pixels: int = PIXELS, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.rand(batch, channels, pixels, pixels, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Task:
    """A network and what the tests should know of it.

    Attributes:
        build: Makes it, untrained.
        frozen: The layers whose channels reach the output, so that none can go, or only all of them together.
        inputs: The positional inputs.
        macs: The share of the multiply-accumulates that goes at least when half of the channels go.
        detects: Whether it takes a list of images and returns a list of dicts; in train mode a dict of losses.
        values: Whether the forward pass depends on values, so that it is read on real tensors.
    """

    build: Callable[[], nn.Module]
    frozen: Collection[str]
    inputs: Callable[[], tuple[Any, ...]] = lambda: (image(),)
    macs: float = 0.7
    detects: bool = False
    values: bool = False


def yolo(
    block: Callable[..., nn.Module],
    detect: Callable[[Sequence[int]], nn.Module],
    frozen: Sequence[str],
    *,
    values: bool = False,
) -> Task:
    return Task(lambda: YOLO(block, detect), [f"detect.{layer}" for layer in frozen], values=values)


def detector(build: Callable[[], nn.Module], frozen: Sequence[str]) -> Task:
    images = list(image(96))
    return Task(build, frozen, lambda: ([images[0], images[1][:, :, :80]],), detects=True, values=True)


def alone(build: Callable[[], nn.Module], frozen: Sequence[str], *about: int, macs: float = 0.7) -> Task:
    return Task(build, frozen, lambda: (image(*about),), macs)


V8 = [f"{branch}.{scale}.2" for scale in range(3) for branch in ("cv2", "cv3")]
V5 = [f"m.{scale}" for scale in range(3)]
SEGMENTED = ("classifier.4", "aux_classifier.4")
RETINA = ("head.classification_head.cls_logits", "head.regression_head.bbox_reg")
SSD = [f"head.{kind}_head.module_list.{scale}.1" for kind in ("classification", "regression") for scale in range(6)]
RPN = ("head.cls_logits", "head.bbox_pred")
BOXES = ("predictor.cls_score", "predictor.bbox_pred")
RESIDUAL = [f"layer{stage}.{conv}" for stage in (3, 4) for conv in ("0.conv2", "0.downsample.0", "1.conv2")]

TASKS: dict[str, Task] = {
    "unet": Task(UNet, ["head"], lambda: (image(92),)),
    "unet, padded": Task(PaddedUNet, ["head"], lambda: (image(92),)),
    "yolo, c2f": yolo(C2f, Detect, V8),
    "yolo, split": yolo(SplitC2f, Detect, V8),
    "yolo, c3": yolo(C3, AnchorDetect, V5),
    "yolo, anchors kept": yolo(C2f, CachingDetect, V8, values=True),
    "fcn": Task(fcn, SEGMENTED),
    "deeplabv3": Task(lambda: segmentation.deeplabv3_mobilenet_v3_large(**UNTRAINED, aux_loss=True), SEGMENTED),
    "lraspp": Task(
        lambda: segmentation.lraspp_mobilenet_v3_large(**UNTRAINED),
        ["classifier.low_classifier", "classifier.high_classifier"],
    ),
    "retinanet": detector(retinanet, RETINA),
    "ssdlite": detector(ssdlite, SSD),
    "fasterrcnn": detector(
        fasterrcnn, [*(f"rpn.{layer}" for layer in RPN), *(f"roi_heads.box_{layer}" for layer in BOXES)]
    ),
    "fcn, backbone": alone(lambda: fcn().backbone, RESIDUAL, macs=0.6),
    "retinanet, backbone and head": alone(lambda: Features(retinanet()), RETINA),
    "ssdlite, backbone and head": alone(lambda: Features(ssdlite()), SSD, 320),
    "fasterrcnn, backbone and head": alone(lambda: Features(fasterrcnn()), RPN, 128),
    "fasterrcnn, box head": alone(lambda: BoxHead(fasterrcnn()), BOXES, 7, 256, 6, macs=0.5),
}
