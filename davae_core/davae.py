"""DA-VAE: a base latent of the small image, a detail latent of the large one, and one decoder for both.

Source: arXiv 2603.22125 sec. 3.1 and the structure of the authors' SD3 release. State-dict names:

    base_encoder.*        an LDM-layout encoder; its trunk also feeds the detail branch unless there is a detail_trunk
    base_quant_conv.*     optional: where the base VAE's layout has it
    detail_trunk.*        optional: a trunk of its own for the detail branch (an encoder without its last convolution)
    detail_down.*         down block, trunk features to detail moments
    joint_up.*            up block, latent to decoder features, in place of the decoder's first convolution
    decoder.*             the rest of an LDM-layout decoder
    base_decoder.*        optional: the base VAE's own decoder, for half-size previews
    base_post_quant_conv.*   beside it where the base VAE's layout has it
    predictor.*           optional: what the detail is expected to be (:mod:`.predictor`); the latent holds the rest
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .autoencoder import (
    AutoencoderConfig,
    Decoder,
    DecoderTrunk,
    Encoder,
    latent_from_moments,
    post_quant_conv,
    quant_conv,
    through,
)
from .bases import normalisation_by_shape
from .errors import CheckpointError, DAVAEError, LatentError
from .latent import LatentSpec
from .latent_blocks import DownBlock, UpBlock
from .predictor import DetailPredictor, PredictorConfig
from .shapes import dims
from .strips import Strips

DEFAULT_ROWS = 64
FEWEST_ROWS = 16  # where even strips of the default height do not fit into memory
PREDICTOR = "predictor."  # in front of the names of a predictor inside


@dataclass(frozen=True)
class DAVAEConfig:
    """Shape of a DA-VAE.

    Attributes:
        base: the base VAE.
        latent: channels, scale and normalisation of the latent.
        shared_trunk: the detail branch uses the base encoder's trunk (the SD3 recipe) and has none of its own.
        base_decoder: the base VAE's decoder is part of the model.
        predictor_width, predictor_blocks: shape of the predictor inside; 0 for none.
    """

    base: AutoencoderConfig = AutoencoderConfig()
    latent: LatentSpec = LatentSpec()
    shared_trunk: bool = True
    base_decoder: bool = False
    predictor_width: int = 0
    predictor_blocks: int = 0

    def __post_init__(self) -> None:
        if self.latent.base_channels != self.base.latent_channels or self.latent.base_factor != self.base.factor:
            raise DAVAEError(
                f"the latent ({self.latent.base_channels} base channels at 1/{self.latent.base_factor}) does not fit "
                f"the base VAE ({self.base.latent_channels} channels at 1/{self.base.factor})"
            )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> "DAVAEConfig":
        """Read the configuration off the shapes; normalisation is not in them: it is that of the one base model that
        the shapes fit, or none.

        Raises:
            CheckpointError: the names or shapes are not those of a DA-VAE.
        """
        base = AutoencoderConfig.from_state_dict(state, "base_encoder.")
        try:
            up = dims(state, "joint_up.conv.weight", 4)  # [width s^2, C + D, 3, 3]
        except CheckpointError as problem:
            raise CheckpointError(f"not a DA-VAE: {problem}") from problem
        shift, scale = normalisation_by_shape(base)
        expected = _predictor_config(state)
        latent = LatentSpec(
            base_channels=base.latent_channels,
            detail_channels=up[1] - base.latent_channels,
            scale=math.isqrt(up[0] // base.feature_channels),
            base_factor=base.factor,
            base_shift=shift,
            base_scale=scale,
        )
        return cls(
            base=base,
            latent=latent,
            shared_trunk=not any(name.startswith("detail_trunk.") for name in state),
            base_decoder="base_decoder.conv_in.weight" in state,
            predictor_width=expected.width if expected else 0,
            predictor_blocks=expected.blocks if expected else 0,
        )


def _predictor_config(state: Mapping[str, torch.Tensor]) -> PredictorConfig | None:
    """The shape of the predictor inside a DA-VAE; None where there is none."""
    inner = {name.removeprefix(PREDICTOR): tensor for name, tensor in state.items() if name.startswith(PREDICTOR)}
    return PredictorConfig.from_state_dict(inner) if inner else None


class DAVAE(nn.Module):
    """Image ``[B, 3, H, W]`` in [-1, 1] to latent ``[B, C + D, H/(f s), W/(f s)]`` and back; H, W multiples of f s.

    Latents are in the autoencoder's units: the first C channels are exactly the base VAE's latent of the 1/s image.
    With a predictor inside, the others hold what it does not expect: the detail less its prediction from the base,
    which decoding adds again. Zeros are then the predicted detail.
    """

    def __init__(self, config: DAVAEConfig) -> None:
        super().__init__()
        self.config = config
        base, latent = config.base, config.latent
        self.base_encoder = Encoder(base)
        self.base_quant_conv = quant_conv(base)
        self.detail_trunk = None if config.shared_trunk else _trunk_only(Encoder(base))
        self.detail_down = DownBlock(base.feature_channels, 2 * latent.detail_channels, latent.scale)
        self.joint_up = UpBlock(latent.channels, base.feature_channels, latent.scale)
        self.decoder = DecoderTrunk(base)
        self.base_decoder = Decoder(base) if config.base_decoder else None
        self.base_post_quant_conv = post_quant_conv(base) if config.base_decoder else None
        self.predictor: DetailPredictor | None = None
        if config.predictor_width:
            shape = PredictorConfig(latent, config.predictor_width, config.predictor_blocks)
            self.predictor = DetailPredictor(shape)

    @property
    def latent(self) -> LatentSpec:
        """Channels, scale and normalisation of the latent."""
        return self.config.latent

    def set_detail_statistics(self, mean: Iterable[float], std: Iterable[float]) -> None:
        """Store the per-channel statistics of the detail latent, measured on training images."""
        latent = replace(self.latent, detail_mean=tuple(map(float, mean)), detail_std=tuple(map(float, std)))
        self.config = replace(self.config, latent=latent)

    def set_base_units(self, shift: float | tuple[float, ...], scale: float | tuple[float, ...]) -> None:
        """Store the units that the decoder and the diffusion model see the base latent in; see :class:`LatentSpec`."""
        latent = replace(self.latent, base_shift=shift, base_scale=scale)
        self.config = replace(self.config, latent=latent)

    @torch.no_grad()
    def set_predictor(self, predictor: DetailPredictor) -> None:
        """Put a copy of a predictor inside, which expects the detail of this DA-VAE; it is not trained from here on.

        From now on latents hold other numbers, so the statistics of the detail are to be measured anew.

        Raises:
            DAVAEError: there is one already, or it is for latents of another shape.
        """
        spec, told = self.latent, predictor.latent
        if self.predictor is not None:
            raise DAVAEError("this DA-VAE has a predictor inside already")
        if (told.base_channels, told.detail_channels) != (spec.base_channels, spec.detail_channels):
            raise DAVAEError(
                f"the predictor is for {told.base_channels} + {told.detail_channels} channels, this DA-VAE has "
                f"{spec.base_channels} + {spec.detail_channels}; give the one that was trained with it"
            )
        shape = predictor.config
        inner = DetailPredictor(replace(shape, latent=spec))
        inner.load_state_dict(predictor.state_dict())
        last = inner.conv_out.state_dict()  # to the autoencoder's units
        std, mean = (last["bias"].new_tensor(values) for values in (told.detail_std, told.detail_mean))
        last["weight"].mul_(std.view(-1, 1, 1, 1))
        last["bias"].mul_(std).add_(mean)
        self.predictor = inner.requires_grad_(False).to(self.joint_up.conv.weight)  # its device and dtype
        self.config = replace(self.config, predictor_width=shape.width, predictor_blocks=shape.blocks)

    def residual(self, z_base: torch.Tensor, z_detail: torch.Tensor) -> torch.Tensor:
        """The detail ``[B, D, h, w]`` as a latent with the base ``z_base [B, C, h, w]`` holds it."""
        return z_detail if self.predictor is None else z_detail - self._expected(z_base).to(z_detail)

    def whole_detail(self, z: torch.Tensor, detail_strength: float = 1.0) -> torch.Tensor:
        """The detail ``[B, D, h, w]`` of a latent ``[B, C + D, h, w]`` as the encoder made it and the decoder wants it:
        what the latent holds, times ``detail_strength``, and what a predictor inside expects of the base."""
        z_base, z_detail = self.latent.split(z)
        z_detail = z_detail * detail_strength
        return z_detail if self.predictor is None else z_detail + self._expected(z_base).to(z_detail)

    def _expected(self, z_base: torch.Tensor) -> torch.Tensor:
        """What the predictor inside expects of the detail, ``[B, D, h, w]`` in the autoencoder's units."""
        assert self.predictor is not None
        return self.predictor(self.latent.normalise_base(z_base).to(self.predictor.conv_in.weight.dtype))

    def encode(
        self, x: torch.Tensor, generator: torch.Generator | None = None, z_base: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Image to ``[base, detail]`` latent.

        Args:
            x: ``[B, 3, H, W]`` in [-1, 1].
            z_base: ``[B, C, H/(f s), W/(f s)]`` to take as the base latent instead of encoding the small image.
            generator: draws the detail latent from its posterior; without one it is the posterior's mean.

        Raises:
            LatentError: H or W is not a multiple of f s, or ``z_base`` has another shape.
        """
        if z_base is None:
            z_base = self.encode_base(x)
        return self._joined(z_base, self.encode_detail(x, generator))

    def encode_base(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to the base VAE's mean latent of the 1/s image, ``[B, C, H/(f s), W/(f s)]``."""
        return self.encode_small(self.shrink(x))

    def encode_small(self, x: torch.Tensor) -> torch.Tensor:
        """The base VAE's mean latent of a picture: ``[B, 3, H, W]`` in [-1, 1] to ``[B, C, H/f, W/f]``."""
        return self._base_mean(self.base_encoder(x))

    def encode_detail(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to ``[B, D, H/(f s), W/(f s)]``."""
        return latent_from_moments(self.detail_moments(x), generator)

    def detail_moments(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to mean and log-variance ``[B, 2D, H/(f s), W/(f s)]``."""
        self._check_image(x)
        return self.detail_down((self.detail_trunk or self.base_encoder).features(x))

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        """The 1/s image the base latent is made of: bicubic, clamped to [-1, 1]."""
        self._check_image(x)
        size = [side // self.latent.scale for side in x.shape[-2:]]
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)

    def decode(self, z: torch.Tensor, detail_strength: float = 1.0) -> torch.Tensor:
        """Latent to image.

        Args:
            z: ``[B, C + D, h, w]``.
            detail_strength: factor on the detail channels; 0 = base only (and what a predictor inside makes of it), 1 =
                as trained.

        Returns:
            ``[B, 3, f s h, f s w]``, about [-1, 1] and not clamped.

        Raises:
            LatentError: ``z`` has the wrong channels.
        """
        return self.decoder.trunk(self.joint_up(self._decoder_input(z, detail_strength)))

    def decode_base(self, z_base: torch.Tensor) -> torch.Tensor:
        """The base VAE's own decoder: ``[B, C, h, w]`` to the 1/s image ``[B, 3, f h, f w]``.

        Raises:
            DAVAEError: the model holds no base decoder.
            LatentError: ``z_base`` has the wrong channels.
        """
        decoder, z = self._base_decoder_input(z_base)
        return decoder(z)

    def encode_tiled(
        self,
        x: torch.Tensor,
        z_base: torch.Tensor | None = None,
        rows: int = DEFAULT_ROWS,
        on_strip: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """:meth:`encode` (posterior mean) in strips of ``rows`` image rows: the same latent in less memory."""
        self._check_image(x)
        trunk = self.detail_trunk or self.base_encoder
        detail = self.detail_down(trunk.finish(Strips(rows, on_strip).encode(trunk, x)))
        if z_base is None:
            z_base = self.encode_small_tiled(self.shrink(x), rows=rows, on_strip=on_strip)
        return self._joined(z_base, latent_from_moments(detail))

    def decode_tiled(
        self,
        z: torch.Tensor,
        detail_strength: float = 1.0,
        rows: int = DEFAULT_ROWS,
        on_strip: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """:meth:`decode` in strips of ``rows`` image rows: the same image in less memory."""
        h = self.decoder.mid(self.joint_up(self._decoder_input(z, detail_strength)))
        return Strips(rows, on_strip).decode(self.decoder, h)

    def encode_small_tiled(
        self, x: torch.Tensor, rows: int = DEFAULT_ROWS, on_strip: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """:meth:`encode_small` in strips of ``rows`` image rows: the same latent in less memory."""
        h = self.base_encoder.finish(Strips(rows, on_strip).encode(self.base_encoder, x))
        return self._base_mean(self.base_encoder.conv_out(h))

    def decode_base_tiled(
        self, z_base: torch.Tensor, rows: int = DEFAULT_ROWS, on_strip: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """:meth:`decode_base` in strips of ``rows`` image rows: the same image in less memory."""
        decoder, z = self._base_decoder_input(z_base)
        return Strips(rows, on_strip).decode(decoder, decoder.mid(decoder.conv_in(z)))

    def _base_decoder_input(self, z_base: torch.Tensor) -> tuple[Decoder, torch.Tensor]:
        """The base decoder, and what it takes of a base latent; raises as :meth:`decode_base` does."""
        if self.base_decoder is None:
            raise DAVAEError(
                "this DA-VAE file holds no base decoder, so it cannot decode a base latent by itself; decode it with "
                "the base model's own VAE file"
            )
        if z_base.ndim != 4 or z_base.shape[1] != self.latent.base_channels:
            expected = f"[batch, {self.latent.base_channels}, height, width]"
            raise LatentError(f"base latent has shape {list(z_base.shape)}, expected {expected}")
        return self.base_decoder, through(self.base_post_quant_conv, z_base)

    def _base_mean(self, moments: torch.Tensor) -> torch.Tensor:
        """Mean latent from base-encoder moments ``[B, 2C, h, w]``."""
        return latent_from_moments(through(self.base_quant_conv, moments))

    def _joined(self, z_base: torch.Tensor, z_detail: torch.Tensor) -> torch.Tensor:
        expected = (z_detail.shape[0], self.latent.base_channels, *z_detail.shape[2:])
        if z_base.shape != expected:
            raise LatentError(
                f"the base latent has shape {list(z_base.shape)}, but the image needs {list(expected)}: it must be the "
                f"ordinary latent of the same image at 1/{self.latent.scale} of the size"
            )
        z_base = z_base.to(z_detail)
        return torch.cat([z_base, self.residual(z_base, z_detail)], dim=1)

    def _decoder_input(self, z: torch.Tensor, detail_strength: float) -> torch.Tensor:
        """The decoder sees the base channels in the base VAE's normalised units (as in the authors' release)."""
        z_base, _ = self.latent.split(z)
        return torch.cat([self.latent.normalise_base(z_base), self.whole_detail(z, detail_strength)], dim=1)

    def _check_image(self, x: torch.Tensor) -> None:
        factor = self.latent.factor
        if (
            x.ndim != 4
            or x.shape[1] != self.config.base.image_channels
            or any(s % factor or not s for s in x.shape[-2:])
        ):
            raise LatentError(
                f"image has shape {list(x.shape)}, expected [batch, {self.config.base.image_channels}, height, width] "
                f"with height and width positive multiples of {factor}"
            )


def _trunk_only(encoder: Encoder) -> Encoder:
    """An encoder whose last convolution is not there: it is used for :meth:`Encoder.features` alone."""
    del encoder.conv_out
    return encoder
