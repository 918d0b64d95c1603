"""Stage 1: the joint decoder and the detail branch on a frozen base VAE; and the encoder by itself, for stage 2.

In the formulas: P pixels of an image, w widths of the VAE's levels, B images at once, e bytes of a number in the
forward pass (4 in fp32, 2 in bf16). Group norm is in fp32 in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...autoencoder import AutoencoderConfig
from ...davae import DAVAE, DAVAEConfig
from ...latent import LatentSpec
from .dit import TRAINED_BYTES, TRAINED_FORMULA
from .terms import Bytes, Flops, conv

# VGG-16's convolutions: inputs, outputs, pixels of the image per pixel of its output.
VGG = (
    *((3, 64, 1), (64, 64, 1), (64, 128, 4), (128, 128, 4), (128, 256, 16), (256, 256, 16), (256, 256, 16)),
    *((256, 512, 64), (512, 512, 64), (512, 512, 64), (512, 512, 256), (512, 512, 256), (512, 512, 256)),
)
VGG_PARAMETERS = sum(inputs * outputs * 9 + outputs for inputs, outputs, _ in VGG)


@dataclass(frozen=True)
class Stage1:
    """Shapes of an autoencoder training; ``pixels`` P, the images are square or of any shape of that area."""

    base: AutoencoderConfig = AutoencoderConfig()
    latent: LatentSpec = LatentSpec()
    pixels: int = 1024**2
    bf16: bool = True
    recompute: bool = True
    perceptual: bool = True


def parameters(shape: Stage1) -> tuple[int, int]:
    """Frozen and trained, counted on the model itself without its memory."""
    with torch.device("meta"):
        model = DAVAE(DAVAEConfig(shape.base, shape.latent, shared_trunk=True, base_decoder=True))
    trained = sum(p.numel() for part in (model.detail_down, model.joint_up, model.decoder) for p in part.parameters())
    return sum(p.numel() for p in model.parameters()) - trained, trained


def middle(width: int, pixels: float) -> float:
    """Operations of the middle block: four convolutions, four projections, attention over all its pixels."""
    return 4 * conv(width, width, 3, pixels) + 4 * conv(width, width, 1, pixels) + 4.0 * pixels**2 * width


def residual(inputs: int, outputs: int, pixels: float) -> float:
    """Operations of a residual block."""
    shortcut = conv(inputs, outputs, 1, pixels) if inputs != outputs else 0.0
    return conv(inputs, outputs, 3, pixels) + conv(outputs, outputs, 3, pixels) + shortcut


def encoder(config: AutoencoderConfig, pixels: float, last: bool) -> float:
    """Operations of an encoder; ``last``: with its last convolution."""
    widths, total = config.widths, conv(config.image_channels, config.widths[0], 3, pixels)
    for i, width in enumerate(widths):
        total += residual(widths[max(i - 1, 0)], width, pixels) + (config.blocks - 1) * residual(width, width, pixels)
        if i < len(widths) - 1:
            pixels /= 4
            total += conv(width, width, 3, pixels)
    return total + middle(widths[-1], pixels) + (conv(widths[-1], 2 * config.latent_channels, 3, pixels) if last else 0)


def decoder_blocks(config: AutoencoderConfig, pixels: float) -> Iterator[tuple[int, int, float, bool]]:
    """Inputs, outputs, pixels of every residual block, from the image backwards, and whether an upsampling precedes."""
    widths = config.widths
    for i, width in enumerate(widths):
        before = widths[min(i + 1, len(widths) - 1)]
        for block in range(config.blocks, -1, -1):
            yield (width if block else before), width, pixels, block == 0 and i < len(widths) - 1
        pixels /= 4


def decoder(config: AutoencoderConfig, pixels: float) -> float:
    """Operations of a decoder without its first convolution."""
    total = middle(config.widths[-1], pixels / config.factor**2)
    total += conv(config.widths[0], config.image_channels, 3, pixels)
    for inputs, outputs, here, up in decoder_blocks(config, pixels):
        total += residual(inputs, outputs, here) + (conv(inputs, inputs, 3, here) if up else 0.0)
    return total


def recomputed(config: AutoencoderConfig, pixels: float) -> float:
    """Operations that checkpointing repeats: of every block, up to the last input that its backward pass wants.

    That is the second convolution's, or the shortcut's behind it where there is one; of an upsampling, nothing before.
    """
    total, small, wide = 0.0, pixels / config.factor**2, config.widths[-1]
    total += 2 * conv(wide, wide, 3, small) + 3 * conv(wide, wide, 1, small) + 4.0 * small**2 * wide
    for inputs, outputs, here, _ in decoder_blocks(config, pixels):
        total += conv(inputs, outputs, 3, here) + (conv(outputs, outputs, 3, here) if inputs != outputs else 0.0)
    return total


def flops(shape: Stage1) -> list[Flops]:
    """Of one image."""
    base, latent, pixels = shape.base, shape.latent, float(shape.pixels)
    wide, square = base.feature_channels, latent.scale**2
    features = pixels / base.factor**2
    small = encoder(base, pixels / square, last=True)
    trunk = encoder(base, pixels, last=False)
    down = conv(wide, 2 * latent.detail_channels // square, 3, features)
    up = conv(latent.channels, wide * square, 3, features / square)
    decode = decoder(base, pixels)
    vgg = sum(conv(inputs, outputs, 3, pixels / per) for inputs, outputs, per in VGG)
    terms = [
        Flops("base encoder, on the 1/s image", "2 in out k^2 pixels per convolution, P / s^2", small),
        Flops("trunk of the detail branch, frozen", "2 in out k^2 pixels per convolution, P", trunk),
        Flops("down block, trained", "2 w 2D/s^2 9 P/f^2", down, down),
        Flops("up block, trained", "2 (C + D) w s^2 9 P/(f s)^2", up, 2 * up),
        Flops(
            "decoder, trained",
            "2 in out k^2 pixels per convolution + 4 (P/f^2)^2 w",
            decode,
            2 * decode,
            recomputed(base, pixels) if shape.recompute else 0.0,
        ),
    ]
    if shape.perceptual:
        terms.append(Flops("perceptual distance (VGG-16), image and reconstruction", "2 x convolutions", 2 * vgg, vgg))
    return terms


def encoding(shape: Stage1, batch: int) -> Bytes:
    """What encoding takes without gradients: block input, norm and SiLU of it, at full resolution."""
    count = 12.0 * batch * shape.base.widths[0] * shape.pixels
    return Bytes("encoding images", "3 x 4 B w0 P", count, "encoding")


def memory(shape: Stage1, batch: int) -> list[Bytes]:
    """Of one process that takes ``batch`` images at once."""
    frozen, trained = parameters(shape)
    e, pixels = 2 if shape.bf16 else 4, shape.pixels
    blocks = list(decoder_blocks(shape.base, pixels))
    norms = (
        8 + e
    )  # of a half block and its input feature: input and normed input in fp32, SiLU of it for the convolution
    inner = [norms * batch * (inputs + outputs) * here for inputs, outputs, here, _ in blocks]
    first = shape.base.widths[0]
    end = "loss" if shape.recompute else "training"  # gone by the time the largest block is computed again
    head = norms * batch * first * pixels
    terms = [
        Bytes("frozen weights", f"{frozen:,} x 4", frozen * 4.0),
        Bytes("trained", f"{trained:,} x ({TRAINED_FORMULA})", float(trained * TRAINED_BYTES)),
        encoding(shape, batch),
        Bytes("last norm and convolution", f"{norms} B w0 P", head, end),
    ]
    if shape.recompute:
        inputs = sum(4.0 * batch * (i * here + (i * here / 4 if up else 0)) for i, _, here, up in blocks)
        most = max(range(len(blocks)), key=inner.__getitem__)
        widest, _, here, _ = blocks[most]
        formula = f"{norms} B (in + out) pixels of the largest"
        terms += [
            Bytes(
                "inputs of the decoder's blocks",
                "4 B in pixels, summed; a quarter before upsampling",
                inputs,
                "training",
            ),
            Bytes("one block, computed again", formula, inner[most], "backward"),
            Bytes("gradients on their way through it", "2 x 4 B in pixels", 8.0 * batch * widest * here, "backward"),
        ]
    else:
        ups = sum(float(e * batch * i * here) for i, _, here, up in blocks if up)
        formula = f"{norms} B (in + out) pixels + {e} B in pixels after upsampling, summed"
        terms.append(Bytes("inside the decoder's blocks", formula, sum(inner) + ups, "training"))
        terms.append(
            Bytes(
                "gradients on their way",
                "2 x 4 B w1 P",
                8.0 * batch * blocks[shape.base.blocks][0] * pixels,
                "training",
            )
        )
    if shape.perceptual:
        activations = sum(e * outputs / per for _, outputs, per in VGG)
        normed = 12.0 * (64 + 128 / 4 + 256 / 16 + 512 / 64 + 512 / 256)
        terms += [
            Bytes("perceptual network (VGG-16)", f"{VGG_PARAMETERS:,} x 4", VGG_PARAMETERS * 4.0),
            Bytes(
                "its activations",
                f"B P (270 e + 3 x 4 x 122), e = {e}",
                batch * pixels * (activations + normed),
                end,
            ),
        ]
    return terms
