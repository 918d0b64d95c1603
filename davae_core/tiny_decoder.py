"""A picture of a DA-VAE latent in a small part of the joint decoder's time: for previews, and where speed counts.

Convolutions without norms, in the layout of the decoders that TAESD (github.com/madebyollin/taesd, MIT) introduced for
ordinary latents; as many enlargements as the factor needs, and each resolution may have a width of its own. State-dict
names, by the place of a layer:

    1                  latent to features
    3, 4, 5            blocks (``conv.0``, ``conv.2``, ``conv.4``) at the latent's resolution; 7 after the enlargement,
    8, 9, 10, 12 ...   and so on for each further resolution
    3 + 5 n, 4 + 5 n   for n enlargements, the one block at full resolution and the last convolution
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .errors import CheckpointError, DAVAEError
from .history import History
from .latent import LatentSpec
from .shapes import dims

BLOCKS = 3  # at each resolution below the full one
MOST_ENLARGEMENTS = 6
MARGIN = 1.1  # for what fragmentation and the kernels themselves take


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Shape of a tiny decoder.

    Attributes:
        latent: what it decodes.
        widths: channels at each resolution, from the latent's to the image's; one more than there are enlargements.
    """

    latent: LatentSpec = LatentSpec()
    widths: tuple[int, ...] = (64, 64, 64, 64, 64)

    def __post_init__(self) -> None:
        if 2 ** (len(self.widths) - 1) != self.latent.factor or min(self.widths) < 1:
            raise DAVAEError(
                f"a tiny decoder for latents at 1/{self.latent.factor} has {round(math.log2(self.latent.factor)) + 1} "
                f"widths of at least 1, from the latent's resolution to the image's; got {self.widths}"
            )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], latent: LatentSpec) -> "TinyDecoderConfig":
        """Read the widths off the shapes; ``latent`` is what the file says it decodes, and is checked against them.

        Raises:
            CheckpointError: the names or shapes are not those of a tiny decoder, or of one for another latent.
        """
        channels, widths = shape_of(state)
        factor = 2 ** (len(widths) - 1)
        if (channels, factor) != (latent.channels, latent.factor):
            raise CheckpointError(
                f"its weights decode latents of {channels} channels at 1/{factor}, its metadata says "
                f"{latent.channels} at 1/{latent.factor}; the file is damaged"
            )
        return cls(latent, widths)


def shape_of(state: Mapping[str, torch.Tensor]) -> tuple[int, tuple[int, ...]]:
    """Latent channels and widths of any decoder in this layout, also those for ordinary latents.

    Raises:
        CheckpointError: the names or shapes are those of something else.
    """
    try:
        width, channels, _, _ = dims(state, "1.weight", 4)
        widths = [width]
        while (name := f"{_after_enlargement(len(widths))}.weight") in state:
            widths.append(dims(state, name, 4)[0])
    except CheckpointError as problem:
        raise CheckpointError(f"not a tiny decoder: {problem}") from problem
    if not 2 <= len(widths) <= MOST_ENLARGEMENTS + 1:
        raise CheckpointError(
            f"not a tiny decoder: it enlarges {len(widths) - 1} times, expected 1 to {MOST_ENLARGEMENTS}"
        )
    return channels, tuple(widths)


def _after_enlargement(number: int) -> int:
    """The place of the convolution after an enlargement, counted from 1."""
    return 2 + number * (BLOCKS + 2)


class Clamp(nn.Module):
    """Soft limits of -3 and 3, so that a stray value of a latent does not spread."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return torch.tanh(z / 3) * 3


class Block(nn.Module):
    """Three convolutions beside a shortcut, ``[B, width, h, w]`` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers[:-1])
        self.fuse = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return self.fuse(self.conv(x) + x)


class TinyDecoder(nn.Sequential):
    """Latents in the diffusion model's units to images.

    Args:
        config: its shape, and the latent that it decodes.

    Attributes:
        history: how it was trained, where its file tells.
    """

    history: History | None = None

    def __init__(self, config: TinyDecoderConfig) -> None:
        widths = config.widths
        layers: list[nn.Module] = [
            Clamp(),
            _steady(nn.Conv2d(config.latent.channels, widths[0], 3, padding=1)),
            nn.ReLU(inplace=True),
        ]
        for width, following in zip(widths, widths[1:]):
            layers += [Block(width) for _ in range(BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), _steady(nn.Conv2d(width, following, 3, padding=1, bias=False))]
        super().__init__(*layers, Block(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1))
        self.config = config

    @property
    def latent(self) -> LatentSpec:
        """What it decodes."""
        return self.config.latent

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Decode.

        Args:
            z: ``[B, C + D, h, w]`` in the diffusion model's units, as a sampler sees it; any size.

        Returns:
            ``[B, 3, f s h, f s w]``, about [-1, 1] and not clamped. The layers themselves give [0, 1], as the layout
            has it.

        Raises:
            LatentError: ``z`` has the wrong channels.
        """
        self.latent.check(z)
        return super().forward(z.contiguous(memory_format=torch.channels_last)) * 2 - 1

    def decode(self, z: torch.Tensor, detail_strength: float = 1.0) -> torch.Tensor:
        """The same of a latent in the autoencoder's units, like :meth:`davae_core.davae.DAVAE.decode`."""
        return self(self._normalised(z, detail_strength))

    def decode_tiled(
        self,
        z: torch.Tensor,
        detail_strength: float = 1.0,
        rows: int = 512,
        on_strip: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """:meth:`decode` in strips of ``rows`` image rows: the same image in less memory."""
        return self.tiled(self._normalised(z, detail_strength), rows, on_strip)

    def tiled(self, z: torch.Tensor, rows: int = 512, on_strip: Callable[[], None] | None = None) -> torch.Tensor:
        """:meth:`forward` in strips of ``rows`` image rows."""
        self.latent.check(z)
        factor, height = self.latent.factor, z.shape[2]
        step, around = max(1, rows // factor), reach(len(self.config.widths) - 1)
        strips = []
        for top in range(0, height, step):
            first, last = max(0, top - around), min(height, top + step + around)
            strip = self(z[:, :, first:last])
            strips.append(strip[:, :, (top - first) * factor : (min(top + step, height) - first) * factor].clone())
            if on_strip is not None:
                on_strip()
        return torch.cat(strips, dim=2)

    def _normalised(self, z: torch.Tensor, detail_strength: float) -> torch.Tensor:
        """From the autoencoder's units to the diffusion model's, with the detail weakened."""
        base, detail = self.latent.split(z)
        return self.latent.normalise(torch.cat([base, detail * detail_strength], dim=1))


def decode_bytes(config: TinyDecoderConfig, height: int, width: int, itemsize: int, rows: int | None = None) -> int:
    """Peak bytes of decoding one image, besides the weights.

    Args:
        config: of the decoder.
        height, width: of the image, in pixels.
        itemsize: bytes of a number.
        rows: image rows of a strip; None for the whole image at once.
    """
    widths = config.widths
    held = max(  # a block's input and two activations of it; or what is enlarged, and the convolution of that
        max(3 * own, above + own) / 4**i for i, (own, above) in enumerate(zip(widths[::-1], (*widths[-2::-1], 0)))
    )
    if rows is None:
        return round(MARGIN * held * height * width * itemsize)
    at_once = min(height, rows + 2 * reach(len(widths) - 1) * config.latent.factor)
    most = max(held * at_once + 3 * height, 6 * height)  # a strip beside the finished ones; these, and joined
    return round(MARGIN * most * width * itemsize)


def mismatch(one: LatentSpec, other: LatentSpec) -> str:
    """Why a decoder of latents ``one`` does not decode latents ``other``, as the end of a sentence; "" where it does.

    The DA-VAE is known again by the statistics of its detail.
    """
    if (one.channels, one.base_channels, one.factor) != (other.channels, other.base_channels, other.factor):
        return (
            f"decodes latents of {one.base_channels} + {one.detail_channels} channels at 1/{one.factor}, but these "
            f"have {other.base_channels} + {other.detail_channels} at 1/{other.factor}"
        )
    z = torch.stack([torch.zeros(1, one.channels, 1, 1), torch.ones(1, one.channels, 1, 1)])
    if all(torch.allclose(one.normalise(each), other.normalise(each), rtol=1e-3, atol=1e-3) for each in z):
        return ""
    return "was made for another DA-VAE: the units of its latents, or the statistics of their detail, are others"


def reach(enlargements: int) -> int:
    """How many latent pixels away a pixel of the image can depend on."""
    block, convolutions = 3, 1 + 3 * BLOCKS  # of a resolution: what leads to it, and its blocks
    below = sum(convolutions / 2**i for i in range(enlargements))
    return math.ceil(below + (1 + block + 1) / 2**enlargements)


def _steady(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution that begins with outputs as large as its inputs: here no norm evens them out."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    return conv
