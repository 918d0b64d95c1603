"""KL autoencoder in the latent-diffusion ("LDM") layout: the VAE of SD1, SDXL and SD3, and VA-VAE.

State-dict names are those of the files (``encoder.down.0.block.0.norm1.weight`` ...), so loading is
``load_state_dict``. The VAEs differ in widths and channels, in whether 1x1 convolutions stand before and after the
latent (``quant_conv``, ``post_quant_conv``; SD3 has none), and in whether resolution levels hold attention (VA-VAE: the
lowest). Group norm of 32 groups, eps 1e-6.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attention
from .errors import CheckpointError, DAVAEError
from .resample import Downsample, Upsample
from .shapes import dims, numbered

NORM_GROUPS = 32
LOGVAR_RANGE = (-30.0, 20.0)
MOST_LEVELS, MOST_BLOCKS = 8, 16  # of a file; the published ones have 3 to 5 levels of 2 blocks


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a KL autoencoder; the defaults are the SD3 VAE.

    Attributes:
        widths: channels of each resolution level, from full resolution down; each a multiple of 32.
        blocks: residual blocks in an encoder level (a decoder level has one more).
        latent_channels: C.
        image_channels: 3 for RGB.
        quant_conv: there are 1x1 convolutions after the encoder (on the moments) and before the decoder.
        attention: the resolution levels with attention after each residual block, counted from full resolution (0).
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 16
    image_channels: int = 3
    quant_conv: bool = False
    attention: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bad = [w for w in self.widths if w <= 0 or w % NORM_GROUPS]
        if bad or not self.widths:
            raise DAVAEError(f"autoencoder widths must be positive multiples of {NORM_GROUPS}, got {self.widths}")
        if min(self.blocks, self.latent_channels, self.image_channels) < 1:
            raise DAVAEError(f"autoencoder needs at least one block and channel everywhere, got {self}")
        if not set(self.attention) <= set(range(len(self.widths))):
            raise DAVAEError(f"attention must name levels 0 to {len(self.widths) - 1}, got {self.attention}")

    @property
    def factor(self) -> int:
        """Pixels per latent pixel in each direction (f = 8 for SD3)."""
        return 2 ** (len(self.widths) - 1)

    @property
    def feature_channels(self) -> int:
        """Channels of the encoder's last features and of the decoder's first (512 for SD3)."""
        return self.widths[-1]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], prefix: str = "encoder.") -> "AutoencoderConfig":
        """Read the configuration off the shapes of an encoder and of the convolution after it.

        Args:
            state: tensors by name.
            prefix: where the encoder's names start; ``quant_conv`` is looked for beside the encoder, so under
                ``base_quant_conv.`` for ``base_encoder.``.

        Raises:
            CheckpointError: the names are not those of an LDM-layout encoder, or the latent has other channels than
                the encoder gives.
        """
        first = rf"{re.escape(prefix)}down\.(\d+)\.block\.0\.norm1\.weight"
        levels = numbered(_numbers(state, first), "resolution levels", MOST_LEVELS)
        inner = rf"{re.escape(prefix)}down\.0\.block\.(\d+)\.norm1\.weight"
        blocks = numbered(_numbers(state, inner), "blocks of a level", MOST_BLOCKS)
        if not levels:
            raise CheckpointError(
                f"not an LDM-layout autoencoder: no tensor is called {prefix}down.0.block.0.norm1.weight"
            )
        widths = tuple(dims(state, f"{prefix}down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
        moments = dims(state, f"{prefix}conv_out.weight", 4)[0]  # mean and log-variance
        quant = f"{prefix.removesuffix('encoder.')}quant_conv.weight"
        if quant in state and tuple(state[quant].shape) != (moments, moments, 1, 1):
            raise CheckpointError(
                f"its quant_conv has shape {list(state[quant].shape)}, expected {[moments, moments, 1, 1]}: a KL "
                f"autoencoder whose encoder gives mean and log-variance of {moments // 2} channels and whose "
                "latent has as many. Use a KL autoencoder"
            )
        return cls(
            widths=widths,
            blocks=blocks,
            latent_channels=moments // 2,
            image_channels=dims(state, f"{prefix}conv_in.weight", 4)[1],
            quant_conv=quant in state,
            attention=tuple(i for i in range(levels) if f"{prefix}down.{i}.attn.0.norm.weight" in state),
        )


def _numbers(state: Mapping[str, torch.Tensor], pattern: str) -> set[int]:
    """The numbers that the one group of ``pattern`` takes among the names."""
    return {int(match.group(1)[:9]) for name in state if (match := re.fullmatch(pattern, name, re.ASCII))}


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU of a tensor that nobody else needs: in its place, unless gradients are to go through it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, beside a shortcut. ``[B, in, h, w] -> [B, out, h, w]``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = silu(self.norm1(x))
        h = self.conv1(h)  # on lines of their own: what a layer has read is freed before the next one works
        h = silu(self.norm2(h))
        h = self.conv2(h)
        return h.add_(self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels. ``[B, c, h, w] -> [B, c, h, w]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        # Contiguous, [B, 1, h*w, c]: else the attention takes memory for all pairs of pixels, 17 GB at 2048 px.
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None].contiguous() for layer in (self.q, self.k, self.v))
        h = attention(q, k, v)  # [B, 1, h*w, c]
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Middle(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """One resolution: residual blocks, each with attention after it or none, then a change of resolution if any."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, handed: list[torch.Tensor]) -> torch.Tensor:
        """Takes its input out of the list, so that no caller holds on to it while the level works."""
        x = handed.pop()
        for i, block in enumerate(self.block):
            x = self.attend(i, block(x))
        return self.upsample(self.downsample(x))

    def attend(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The attention after block ``i``, where the level has any."""
        return self.attn[i](x) if self.attn else x


class Encoder(nn.Module):
    """Image to moments: ``[B, 3, H, W]`` in [-1, 1] to ``[B, 2C, H/f, W/f]`` (mean, log-variance)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.blocks, i in config.attention)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def levels(self, x: torch.Tensor) -> torch.Tensor:
        """All resolution levels: the local part, but for attention. ``[B, 3, H, W] -> [B, width, H/f, W/f]``."""
        handed = [self.conv_in(x)]
        for level in self.down:
            handed.append(level(handed))
        return handed.pop()

    def finish(self, h: torch.Tensor) -> torch.Tensor:
        """The global part: middle block, last norm and SiLU. Same shape in and out."""
        return silu(self.norm_out(self.mid(h)))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Everything but the last convolution. ``[B, 3, H, W] -> [B, width, H/f, W/f]``."""
        return self.finish(self.levels(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(self.features(x))


class DecoderTrunk(nn.Module):
    """A decoder without its first convolution: features ``[B, width, h, w]`` to an image ``[B, 3, f h, f w]``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            above = widths[min(i + 1, len(widths) - 1)]
            level = Level(above, width, config.blocks + 1, i in config.attention)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def levels(self, h: torch.Tensor) -> torch.Tensor:
        """Everything after the middle block: local, but for attention. ``[B, width, h, w] -> [B, 3, f h, f w]``."""
        handed = [h]
        for level in reversed(self.up):
            handed.append(level(handed))
        return self.conv_out(silu(self.norm_out(handed.pop())))

    def trunk(self, h: torch.Tensor) -> torch.Tensor:
        """Middle block and levels."""
        return self.levels(self.mid(h))


class Decoder(DecoderTrunk):
    """Latent to image: ``[B, C, h, w]`` to ``[B, 3, f h, f w]``, about [-1, 1] and not clamped."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.conv_in = nn.Conv2d(config.latent_channels, config.feature_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.trunk(self.conv_in(z))


class Autoencoder(nn.Module):
    """An LDM-layout VAE. Latents are raw: the shift and scale of the diffusion model are applied outside."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = quant_conv(config)
        self.post_quant_conv = post_quant_conv(config)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to mean and log-variance, ``[B, 2C, H/f, W/f]``."""
        return through(self.quant_conv, self.encoder(x))

    def encode(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to ``[B, C, H/f, W/f]``: the mean, or a sample when a generator is given."""
        return latent_from_moments(self.moments(x), generator)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """``[B, C, h, w]`` to ``[B, 3, f h, f w]``, about [-1, 1] and not clamped."""
        return self.decoder(through(self.post_quant_conv, z))


def quant_conv(config: AutoencoderConfig) -> nn.Conv2d | None:
    """The convolution on the moments that the encoder gives, where the layout has one."""
    return nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1) if config.quant_conv else None


def post_quant_conv(config: AutoencoderConfig) -> nn.Conv2d | None:
    """The convolution on the latent that the decoder gets, where the layout has one."""
    return nn.Conv2d(config.latent_channels, config.latent_channels, 1) if config.quant_conv else None


def through(layer: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)``, or ``x`` where there is no such layer."""
    return x if layer is None else layer(x)


def latent_from_moments(moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Mean of a diagonal Gaussian ``[B, 2C, h, w]``, or a sample of it when a generator is given."""
    mean, logvar = moments.chunk(2, dim=1)
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + noise * torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
