"""Plain numbers on images ``[B, 3, H, W]`` in [-1, 1]."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .errors import LatentError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_CHUNK = 4096


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB for a data range of 2, ``[B]``; infinite where the images are equal.

    Raises:
        LatentError: the shapes differ.
    """
    if a.shape != b.shape:
        raise LatentError(f"PSNR compares images of one shape; given {[*a.shape]} and {[*b.shape]}")
    error = (a.float() - b.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error)


def luma(x: torch.Tensor) -> torch.Tensor:
    """Grey ``[B, 1, H, W]`` of images ``[B, 3, H, W]``, in the same range, float32."""
    return torch.einsum("bchw,c->bhw", x.float(), x.new_tensor(_LUMA, dtype=torch.float32))[:, None]


def resize_bicubic(x: torch.Tensor, scale: float) -> torch.Tensor:
    """``[B, C, H, W]`` to ``[B, C, round(H * scale), round(W * scale)]``, clamped to [-1, 1].

    The cubic (a = -0.5) widens with the reduction, so that shrinking does not alias.
    """
    size: Sequence[int] = [max(1, round(side * scale)) for side in x.shape[2:]]
    return F.interpolate(x.float(), size=size, mode="bicubic", antialias=True).clamp(-1, 1).to(x.dtype)


def pooled_distance(x: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """How far each image is from each reference when both are small: ``[B, N]``.

    The mean squared difference over pixels and channels, of the image or its mirror image, whichever is nearer. The
    references are converted to float32 a few at a time and may be stored in a smaller type.

    Args:
        x: images ``[B, 3, H, W]`` in [-1, 1]; averaged down to the size of the references.
        references: average-pooled images ``[N, 3, h, w]`` in [-1, 1], on any device.

    Raises:
        LatentError: the references are larger than the images or have other channels.
    """
    if x.shape[1] != references.shape[1] or x.shape[2] < references.shape[2] or x.shape[3] < references.shape[3]:
        raise LatentError(
            f"images {[*x.shape]} cannot be pooled to references {[*references.shape]}: both must be [*, 3, height, "
            "width], the references no larger than the images"
        )
    small = F.adaptive_avg_pool2d(x.float(), (references.shape[2], references.shape[3]))
    both = torch.stack([small, small.flip(-1)]).flatten(2)  # [2, B, 3hw]
    columns = []
    for some in references.flatten(1).split(_CHUNK):
        some = some.to(both.device, torch.float32)
        # The products of cdist's matrix mode would not give zero for equal images.
        distance = torch.cdist(both, some.expand(2, -1, -1), compute_mode="donot_use_mm_for_euclid_dist")
        columns.append(distance.amin(0).square() / both.shape[2])
    return torch.cat(columns, 1) if columns else both.new_zeros(len(x), 0)
