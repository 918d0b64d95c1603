"""What a DA-VAE latent is: its channels, its spatial factor, and the units the diffusion model sees it in."""

import math
from dataclasses import dataclass

import torch

from .bases import SD3_SCALE, SD3_SHIFT
from .errors import DAVAEError, LatentError


@dataclass(frozen=True)
class LatentSpec:
    """A latent ``[B, C + D, H/(f s), W/(f s)]``, channels in the order [base, detail].

    Attributes:
        base_channels: C, the channels of the pretrained latent of the 1/s image.
        detail_channels: D, a multiple of C.
        scale: s, how much further than the base VAE the latent compresses in each direction.
        base_factor: f, pixels per latent pixel of the base VAE.
        base_shift, base_scale: the model sees ``(z_base - base_shift) * base_scale``; one number each, or C.
        detail_mean, detail_std: D numbers each; the model sees ``(z_detail - detail_mean) / detail_std``.
        preview: C + 1 times red, green, blue, see :func:`davae_core.preview.fit_preview`; empty for the colours that
            are known of the base VAE.
    """

    base_channels: int = 16
    detail_channels: int = 16
    scale: int = 2
    base_factor: int = 8
    base_shift: float | tuple[float, ...] = SD3_SHIFT
    base_scale: float | tuple[float, ...] = SD3_SCALE
    detail_mean: tuple[float, ...] = ()
    detail_std: tuple[float, ...] = ()
    preview: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.base_channels < 1 or self.detail_channels < 1 or self.detail_channels % self.base_channels:
            raise DAVAEError(
                f"detail channels must be a positive multiple of the base channels, got {self.detail_channels} detail "
                f"on {self.base_channels} base channels"
            )
        if self.scale not in (2, 4):
            raise DAVAEError(f"scale s must be 2 or 4, got {self.scale}")
        object.__setattr__(self, "detail_mean", self.detail_mean or (0.0,) * self.detail_channels)
        object.__setattr__(self, "detail_std", self.detail_std or (1.0,) * self.detail_channels)
        for name in ("detail_mean", "detail_std"):
            values = getattr(self, name)
            if len(values) != self.detail_channels:
                raise DAVAEError(f"{name} must hold {self.detail_channels} numbers, got {len(values)}")
        if len(self.preview) not in (0, 3 * (self.base_channels + 1)):
            raise DAVAEError(
                f"preview must hold {3 * (self.base_channels + 1)} numbers or none, got {len(self.preview)}"
            )
        for name in ("base_shift", "base_scale"):
            if (count := len(_numbers(getattr(self, name)))) not in (1, self.base_channels):
                raise DAVAEError(f"{name} must be one number or {self.base_channels}, got {count}")
        factors = (*_numbers(self.base_scale), *self.detail_std)
        shifts = (*_numbers(self.base_shift), *self.detail_mean)
        if not all(math.isfinite(value) for value in (*shifts, *factors, *self.preview)):
            raise DAVAEError("base_shift, base_scale, detail_mean, detail_std and preview must be finite numbers")
        if not all(value > 0 for value in factors):
            raise DAVAEError("base_scale and every detail_std must be above 0")

    @property
    def channels(self) -> int:
        """C + D."""
        return self.base_channels + self.detail_channels

    @property
    def factor(self) -> int:
        """f s: image pixels per latent pixel in each direction."""
        return self.base_factor * self.scale

    def check(self, z: torch.Tensor, what: str = "latent") -> None:
        """Raise LatentError unless ``z`` is ``[B, C + D, h, w]`` with at least one picture in the batch."""
        self.check_shape(tuple(z.shape), what)

    def check_shape(self, shape: tuple[int, ...], what: str = "latent") -> None:
        """:meth:`check` of a shape."""
        if len(shape) != 4 or shape[1] != self.channels:
            raise LatentError(
                f"{what} has shape {list(shape)}, expected [batch, {self.channels}, height/{self.factor}, "
                f"width/{self.factor}] ({self.base_channels} base + {self.detail_channels} detail channels)"
            )
        if not all(shape):
            raise LatentError(f"{what} has shape {list(shape)}: there is no picture in it")

    def split(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, C + D, h, w]`` to views ``[B, C, h, w]``, ``[B, D, h, w]``."""
        self.check(z)
        return z[:, : self.base_channels], z[:, self.base_channels :]

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """From the autoencoder's units to the diffusion model's."""
        mean, scale = self._affine(z)
        return (z - mean) * scale

    def denormalise(self, z: torch.Tensor) -> torch.Tensor:
        """From the diffusion model's units to the autoencoder's."""
        mean, scale = self._affine(z)
        return z / scale + mean

    def normalise_base(self, z_base: torch.Tensor) -> torch.Tensor:
        """:meth:`normalise` of the base channels alone, ``[B, C, h, w]``."""
        shift, scale = (_per_channel(_numbers(value), z_base) for value in (self.base_shift, self.base_scale))
        return (z_base - shift) * scale

    def denormalise_base(self, z_base: torch.Tensor) -> torch.Tensor:
        """:meth:`denormalise` of the base channels alone, ``[B, C, h, w]``."""
        shift, scale = (_per_channel(_numbers(value), z_base) for value in (self.base_shift, self.base_scale))
        return z_base / scale + shift

    def _affine(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-channel shift and factor, ``[1, C + D, 1, 1]`` each."""
        self.check(z)
        shift, scale = _numbers(self.base_shift), _numbers(self.base_scale)
        mean = shift * (self.base_channels // len(shift)) + self.detail_mean
        factor = scale * (self.base_channels // len(scale)) + tuple(1 / std for std in self.detail_std)
        return _per_channel(mean, z), _per_channel(factor, z)


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _per_channel(values: tuple[float, ...], z: torch.Tensor) -> torch.Tensor:
    """``[1, len(values), 1, 1]`` in the dtype and on the device of ``z``."""
    return z.new_tensor(values).view(1, -1, 1, 1)


def with_base(z: torch.Tensor, z_base: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """``[B, C + D, h, w]`` with its base channels replaced by ``z_base``, ``[B, C, h, w]`` or ``[1, C, h, w]``."""
    _, detail = spec.split(z)
    expected = (spec.base_channels, *z.shape[2:])
    if z_base.ndim != 4 or tuple(z_base.shape[1:]) != expected or z_base.shape[0] not in (1, z.shape[0]):
        raise LatentError(
            f"the base latent has shape {list(z_base.shape)}, but the base of a DA-VAE latent of shape {list(z.shape)} "
            f"has {[z.shape[0], *expected]}, or a batch of 1: the ordinary latent of the image at 1/{spec.scale} size"
        )
    return torch.cat([z_base.expand(z.shape[0], -1, -1, -1), detail], dim=1)


def with_zero_detail(z_base: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """An ordinary latent ``[B, C, h, w]`` as the base of an image s times the size: ``[B, C + D, h, w]``."""
    if z_base.ndim != 4 or z_base.shape[1] != spec.base_channels or not z_base.numel():
        raise LatentError(
            f"base latent has shape {list(z_base.shape)}, expected [batch, {spec.base_channels}, height, width], none "
            "of them 0"
        )
    batch, _, height, width = z_base.shape
    return torch.cat([z_base, z_base.new_zeros(batch, spec.detail_channels, height, width)], dim=1)
