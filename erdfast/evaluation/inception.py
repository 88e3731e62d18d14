"""The Inception network behind FID: TensorFlow's graph of 2015-12-05 (Szegedy et al. 2015), 1008 logits.

It is not torchvision's Inception v3. Average pools do not count the padding, the pool of the last block takes
maxima, pictures are resized to 299 by TensorFlow 1's rule (corner-aligned grid, no antialiasing) and scaled as
(x - 128) / 128. Any of these differences moves FID by more than what papers compare.

B batch, C channels, H, W height and width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 299
"""Side of the pictures that the network sees."""
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7
"""ADM's choice: 7 * 17 * 17 = 2023 numbers, about as many as pooled features."""
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17
NUM_LOGITS = 1008


class InceptionFeatures(NamedTuple):
    """What the metrics use of a picture."""

    pool: Tensor
    """(B, 2048) float32, last block averaged over the picture: FID, precision, recall, Inception score."""
    spatial: Tensor
    """(B, 2023) float32, first 7 channels of Mixed_6d (its 1x1 branch), flattened as H, W, C: sFID."""


class InceptionNetwork(nn.Module):
    """Feature extractor of FID and its relatives; parameters are named as in the converted weight files.

    Weights come from `load_inception`; those of a new network are random.
    """

    pool_features, spatial_features, num_logits = POOL_FEATURES, SPATIAL_FEATURES, NUM_LOGITS

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = Mixed35(192, 32)
        self.Mixed_5c = Mixed35(256, 64)
        self.Mixed_5d = Mixed35(288, 64)
        self.Mixed_6a = Reduce35(288)
        self.Mixed_6b = Mixed17(768, 128)
        self.Mixed_6c = Mixed17(768, 160)
        self.Mixed_6d = Mixed17(768, 160)
        self.Mixed_6e = Mixed17(768, 192)
        self.Mixed_7a = Reduce17(768)
        self.Mixed_7b = Mixed8(1280, average_3x3)
        self.Mixed_7c = Mixed8(2048, maximum_3x3)
        self.fc = nn.Linear(POOL_FEATURES, NUM_LOGITS)

    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of pictures.

        Args:
            images: (B, 3, H, W), uint8 or float, in 0..255, of any size.

        Raises:
            ValueError: another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures must be (B, 3, H, W), got {tuple(images.shape)}")
        x = (resize_tf1(images.to(self.fc.weight.dtype), SIZE) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # the 1x1 branch comes first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return InceptionFeatures(x.mean(dim=(2, 3)), spatial)

    def logits(self, pool: Tensor) -> Tensor:
        """(B, 2048) => (B, 1008), with the bias, as the network was trained."""
        return self.fc(pool)

    def logits_unbiased(self, pool: Tensor) -> Tensor:
        """(B, 2048) => (B, 1008), without the bias: what ADM's Inception score takes the softmax of."""
        return F.linear(pool, self.fc.weight)

    def fold_norms(self) -> InceptionNetwork:
        """Batch norms become part of their convolutions, once the weights are there; returns the network."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold_norm()
        return self


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with running statistics, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=stride, bias=False, **options)
        self.bn: nn.Module = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) => (B, out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Scale and shift of the norm move into the convolution, by way of float64."""
        norm = self.bn
        if not isinstance(norm, nn.BatchNorm2d):
            return
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = self.conv.weight.double() * scale[:, None, None, None]
        bias = norm.bias.double() - norm.running_mean.double() * scale
        self.conv.weight.copy_(weight)
        self.conv.bias = nn.Parameter(bias.to(self.conv.weight.dtype))
        self.bn = nn.Identity()


class Mixed35(nn.Module):
    """Block on the 35x35 grid."""

    def __init__(self, channels: int, pool_out: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 64, 1)
        self.branch5x5_1 = ConvNorm(channels, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(channels, pool_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 35, 35) => (B, 224 + pool_out, 35, 35)."""
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(average_3x3(x))], dim=1)


class Reduce35(nn.Module):
    """From the 35x35 grid to 17x17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 35, 35) => (B, C + 480, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed17(nn.Module):
    """Block on the 17x17 grid, 7x7 convolutions as pairs of 1x7 and 7x1."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        row: dict = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = ConvNorm(channels, 192, 1)
        self.branch7x7_1 = ConvNorm(channels, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, **row)
        self.branch7x7_3 = ConvNorm(width, 192, **column)
        self.branch7x7dbl_1 = ConvNorm(channels, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, **column)
        self.branch7x7dbl_3 = ConvNorm(width, width, **row)
        self.branch7x7dbl_4 = ConvNorm(width, width, **column)
        self.branch7x7dbl_5 = ConvNorm(width, 192, **row)
        self.branch_pool = ConvNorm(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 17, 17) => (B, 768, 17, 17)."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average_3x3(x))], dim=1)


class Reduce17(nn.Module):
    """From the 17x17 grid to 8x8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(channels, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(channels, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 17, 17) => (B, C + 512, 8, 8)."""
        small = self.branch3x3_2(self.branch3x3_1(x))
        large = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([small, large, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed8(nn.Module):
    """Block on the 8x8 grid; the two differ in their pool."""

    def __init__(self, channels: int, pool) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 320, 1)
        self.branch3x3_1 = ConvNorm(channels, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNorm(channels, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNorm(channels, 192, 1)
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 8, 8) => (B, 2048, 8, 8)."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        fans = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        fans += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *fans, self.branch_pool(self._pool(x))], dim=1)


def average_3x3(x: Tensor) -> Tensor:
    """Mean over 3x3 neighbours; at the rim over those that exist, as in TensorFlow."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum_3x3(x: Tensor) -> Tensor:
    """Maximum over 3x3 neighbours."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize: output pixel i looks at i * old / new, without half pixels or antialiasing.

    Args:
        images: (B, C, H, W) float.
        size: the new height and width.

    Returns:
        (B, C, size, size); `images` itself where it has that size.
    """
    if images.shape[2:] == (size, size):
        return images
    left, right, part = _neighbours(images.shape[3], size, images)
    start, end = images.index_select(3, left), images.index_select(3, right)
    rows = torch.lerp(start, end, part)
    top, bottom, part = _neighbours(images.shape[2], size, images)
    return torch.lerp(rows.index_select(2, top), rows.index_select(2, bottom), part[:, None])


def _neighbours(old: int, new: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per output pixel the input pixels before and after it, and how far it is on its way from one to the other."""
    place = torch.arange(new, dtype=torch.float32, device=like.device) * torch.tensor(old / new, dtype=torch.float32)
    before = place.floor().long().clamp_max(old - 1)
    return before, (before + 1).clamp_max(old - 1), (place - before).to(like.dtype)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 convolutions and products without TF32, which PyTorch allows convolutions by default.

    TF32 keeps 10 bits: relative errors of 1e-3 in features that two implementations of FID should agree on to 1e-5.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
