"""The faces of a DA-VAE that stock VAE nodes accept: ComfyUI's VAE object around the whole model, or its base VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import nn

from ...davae_core.autoencoder import Autoencoder, AutoencoderConfig
from ...davae_core.davae import DAVAE
from ...davae_core.errors import LatentError
from .history import note_decoded
from .memory import Ways

if TYPE_CHECKING:
    from .autoencoder import AutoencoderHandle

# What nodes that cut up a VAE themselves look for in its first-stage model.
_PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")


class Stage(nn.Module):
    """What a stock VAE object calls its first-stage model: a face of the DA-VAE, which it does not own."""

    channels: int
    factor: int

    def __init__(self, handle: AutoencoderHandle) -> None:
        super().__init__()
        self.__dict__["handle"] = handle  # its model is not a submodule: the DA-VAE's own patcher moves its weights

    def __getattr__(self, name: str) -> Any:
        if name in _PARTS:
            raise AttributeError(
                f"this VAE comes from the DA-VAE Loader and has no {name} of its own to be cut into tiles. Use the "
                "stock VAE Encode and VAE Decode nodes, tiled or not, or Detail Encode and Detail Decode: they work in "
                "strips where memory is short, with no seams"
            )
        return super().__getattr__(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The DA-VAE's tensors, for nodes that save a VAE."""
        return self.handle.model.state_dict(*args, **kwargs)

    def encoding(self, shape: tuple[int, ...]) -> Ways:
        """Ways to encode images ``[B, 3, H, W]`` of this shape, one at a time."""
        raise NotImplementedError

    def decoding(self, shape: tuple[int, ...]) -> Ways:
        """Ways to decode latents of this shape, one at a time."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        """Images in [-1, 1] to latents, unnormalised."""
        return one_by_one(self.encoding(tuple(x.shape)), x)

    def decode(self, z: torch.Tensor, **_: Any) -> torch.Tensor:
        """Latents, unnormalised, to images in about [-1, 1]."""
        return one_by_one(self.decoding(tuple(z.shape)), z)

    def encode_tiled(self, pixels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """In place of the stock VAE's tiling: strips give the exact latent, whatever tile size is asked for.

        Takes ``[B, 3, H, W]`` in [0, 1].
        """
        return self.handle.each(self.encoding(tuple(pixels.shape)).frugal(), [(p,) for p in (pixels * 2 - 1).split(1)])

    def decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """In place of the stock VAE's tiling: strips give the exact image, whatever tile size is asked for.

        Gives ``[B, 3, H, W]`` in [0, 1].
        """
        ways = self.decoding(tuple(samples.shape)).frugal()
        return to_unit_range(self.handle.each(ways, [(part,) for part in samples.split(1)]))


class JointStage(Stage):
    """The whole DA-VAE."""

    def __init__(self, handle: AutoencoderHandle) -> None:
        super().__init__(handle)
        self.channels, self.factor = handle.latent.channels, handle.latent.factor

    def encoding(self, shape: tuple[int, ...]) -> Ways:
        require_images(shape, self.factor)
        return self.handle.encoding(shape[2], shape[3])

    def decoding(self, shape: tuple[int, ...]) -> Ways:
        self.handle.latent.check_shape(shape, "the LATENT")
        return self.handle.decoding(shape[2], shape[3])

    def decode(self, z: torch.Tensor, **options: Any) -> torch.Tensor:
        note_decoded(z, self.handle.model, self.handle.name)
        return super().decode(z, **options)

    def decode_tiled(self, samples: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        note_decoded(samples, self.handle.model, self.handle.name)
        return super().decode_tiled(samples, *arguments, **options)


class BaseStage(Stage):
    """The base VAE alone."""

    def __init__(self, handle: AutoencoderHandle) -> None:
        super().__init__(handle)
        self.channels, self.factor = handle.latent.base_channels, handle.latent.base_factor

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The base VAE's tensors under the names of its own file."""
        state = self.handle.model.state_dict(*args, **kwargs)
        return {name.removeprefix("base_"): tensor for name, tensor in state.items() if name.startswith("base_")}

    def encoding(self, shape: tuple[int, ...]) -> Ways:
        require_images(shape, self.factor)
        return self.handle.base_encoding(shape[2], shape[3])

    def decoding(self, shape: tuple[int, ...]) -> Ways:
        if len(shape) == 4 and shape[1] != self.channels:
            raise LatentError(
                f"the base VAE decodes latents of {self.channels} channels, the LATENT has {shape[1]}; take its base "
                "with DA-VAE to Base Latent, or decode all of it with the VAE output of the DA-VAE Loader"
            )
        if len(shape) != 4 or not all(shape):
            raise LatentError(f"the LATENT has shape {list(shape)}, expected at least one image's base latent")
        return self.handle.base_decoding(shape[2], shape[3])


class Face:
    """What is ours in a stock VAE object; a copy of it that is moved to another device keeps its face."""

    patcher: comfy.model_patcher.ModelPatcher

    @property
    def first_stage_model(self) -> Stage:
        """The face."""
        return self.__dict__["stage"]

    @first_stage_model.setter
    def first_stage_model(self, model: nn.Module) -> None:
        if isinstance(model, DAVAE):  # as newer ComfyUI does for another device, from the patcher
            stage = self.__dict__["stage"]
            model = type(stage)(replace(stage.handle, model=model, patcher=self.patcher))
        self.__dict__["stage"] = model

    def memory_used_encode(self, shape: Any, *_: Any) -> int:
        """Bytes that encoding takes beside the weights."""
        return self.first_stage_model.encoding(tuple(shape)).need()

    def memory_used_decode(self, shape: Any, *_: Any) -> int:
        """Bytes that decoding takes beside the weights."""
        return self.first_stage_model.decoding(tuple(shape)).need()

    def _tile_bounded_shape(self, shape: Any, *_: Any) -> list[int]:
        """Newer ComfyUI counts one tile; strips are of the whole width."""
        return list(shape)

    def encode_tiled_(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In strips."""
        return self.first_stage_model.encode_tiled(*args, **kwargs)

    def decode_tiled_(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In strips."""
        return self.first_stage_model.decode_tiled(*args, **kwargs)


def stock_vae(stage: Stage) -> comfy.sd.VAE:
    """ComfyUI's VAE object around a face of ours.

    The object is built by ComfyUI around a minute model and keeps every attribute it got there, in any version; only
    what concerns our model is replaced.
    """
    handle, vae = stage.handle, _minute_vae()
    for name in ("first_stage_model", "memory_used_encode", "memory_used_decode"):  # the class has them
        vae.__dict__.pop(name)
    vae.__class__ = type("VAE", (Face, comfy.sd.VAE), {})
    vae.first_stage_model = stage
    vae.patcher = handle.patcher
    vae.vae_dtype = handle.dtype
    vae.device = handle.patcher.load_device
    vae.latent_channels = stage.channels
    vae.downscale_ratio = vae.upscale_ratio = stage.factor
    vae.disable_offload = True  # our layers are ordinary torch layers, which cannot be loaded one by one
    vae.size = comfy.model_management.module_size(handle.model)
    return vae


def one_by_one(function: Callable[..., torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """``function`` on each picture of a batch, which ComfyUI makes as large as it thinks that memory allows."""
    return torch.cat([function(part) for part in batch.split(1)])


def require_images(shape: tuple[int, ...], factor: int) -> None:
    """Raise LatentError unless this is the shape ``[B, 3, H, W]`` of a batch of images, cut to multiples of factor."""
    if len(shape) != 4 or not shape[0]:
        raise LatentError(
            f"the images have shape {list(shape)}, expected [batch, 3, height, width] with at least one image: an "
            "empty batch or a video cannot be encoded"
        )
    if not all(shape):
        raise LatentError(
            f"the image is smaller than {factor} x {factor} px, one pixel of the latent; give a larger one"
        )


def to_unit_range(x: torch.Tensor) -> torch.Tensor:
    """From about [-1, 1] to [0, 1]."""
    return ((x + 1) / 2).clamp_(0, 1)


def _minute_vae() -> comfy.sd.VAE:
    """A stock VAE object around the smallest autoencoder its constructor takes."""
    tiny = Autoencoder(AutoencoderConfig(widths=(32,), blocks=1, latent_channels=4, quant_conv=True))
    shape = {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    return comfy.sd.VAE(sd=tiny.state_dict(), config={"params": {"ddconfig": shape, "embed_dim": 4}})
