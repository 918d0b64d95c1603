"""Run a source and what it was converted to on the same input; a difference stops the conversion."""

import torch
from torch import nn

from ..autoencoder import Autoencoder, AutoencoderConfig
from ..errors import CheckpointError
from ..mmdit import MMDiT, MMDiTConfig
from . import layout, reference
from .tensors import Tensors

TOLERANCE = 1e-4  # of the largest number that the source gives; both run in float32


def same(what: str, converted: torch.Tensor, source: torch.Tensor) -> float:
    """The largest difference as a part of the source's largest number.

    Raises:
        CheckpointError: it is above :data:`TOLERANCE`, or the source gives no numbers.
    """
    if not torch.isfinite(source).all():
        raise CheckpointError(f"{what}: the source gives values that are not numbers (NaN or infinity); it is damaged")
    if converted.shape != source.shape:
        raise CheckpointError(f"{what}: {list(converted.shape)} after conversion, {list(source.shape)} before")
    difference = float((converted - source).abs().max() / source.abs().max().clamp(min=1e-6))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{what} differs by {difference:.1e} of its largest value after conversion, at most {TOLERANCE:.0e} is "
            "rounding. The file is not of the layout that its names tell; nothing was written"
        )
    return difference


@torch.no_grad()
def mmdit(native: Tensors, theirs: Tensors | None, file: str) -> float:
    """Run the model, and the same weights in diffusers' names by :mod:`.reference` where there are such.

    Returns:
        The largest relative difference; 0 where there is nothing to compare with.

    Raises:
        CheckpointError: they differ, or the tensors are not those of an SD3 model.
    """
    config = MMDiTConfig.from_state_dict(native.meta)
    with torch.device("meta"):
        model = MMDiT(config)
    layout.check(native.meta, model, file)
    draw = torch.Generator().manual_seed(0)
    side = min(3, config.grid) * config.patch
    x = torch.randn(1, config.in_channels, side, min(2, config.grid) * config.patch, generator=draw)
    t = torch.rand(1, generator=draw)
    context = torch.randn(1, 3, config.context, generator=draw)
    pooled = torch.randn(1, config.pooled, generator=draw)
    ours = _streamed(model, native)(x, t, context, pooled)
    if theirs is None:
        return same(f"the prediction of {file}", ours, ours)
    return same(f"the prediction of {file}", ours, reference.transformer(theirs, x, t, context, pooled))


def _streamed(model: MMDiT, native: Tensors) -> MMDiT:
    """The model on the meta device; each part gets its weights in float32 when it runs, and loses them after."""
    model.pos_embed = native["pos_embed"]
    parts = ["x_embedder", "t_embedder", "y_embedder", "context_embedder", "final_layer"]
    parts += [f"joint_blocks.{i}" for i in range(model.config.depth)]
    for name in parts:
        part = model.get_submodule(name)

        def load(module: nn.Module, _: object, name: str = name) -> None:
            state = {key: native[f"{name}.{key}"].float() for key in module.state_dict()}
            module.load_state_dict(state, assign=True)

        def drop(module: nn.Module, _: object, __: object) -> None:
            module.to("meta")

        part.register_forward_pre_hook(load)
        part.register_forward_hook(drop)
    return model


@torch.no_grad()
def autoencoder(native: Tensors, theirs: Tensors | None, file: str) -> float:
    """As :func:`mmdit`, for a plain VAE: encode and decode."""
    config = AutoencoderConfig.from_state_dict(native.meta)
    with torch.device("meta"):
        model = Autoencoder(config)
    layout.check(native.meta, model, file)
    model.load_state_dict({name: tensor.float() for name, tensor in native.items()}, assign=True)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(1, config.image_channels, 2 * config.factor, 2 * config.factor, generator=draw) * 2 - 1
    z = torch.randn(1, config.latent_channels, 2, 2, generator=draw)
    latent, image = model.encode(x), model.decode(z)
    wanted = (reference.encode(theirs, x), reference.decode(theirs, z)) if theirs is not None else (latent, image)
    return max(same(f"the latent of {file}", latent, wanted[0]), same(f"the image of {file}", image, wanted[1]))
