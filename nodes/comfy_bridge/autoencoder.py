"""A DA-VAE in ComfyUI: one set of weights under one patcher, seen as DAVAE, as a stock VAE, and as the base VAE."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import nn

from ...davae_core import checkpoints
from ...davae_core.autoencoder import Autoencoder, AutoencoderConfig
from ...davae_core.davae import DAVAE
from ...davae_core.errors import LatentError
from ...davae_core.latent import LatentSpec
from .history import note_decoded
from .versions import intermediate_dtype

# Bytes of working memory per image pixel and byte of the dtype; ComfyUI's own estimates for this kind of autoencoder.
DECODE_BYTES = 2178
ENCODE_BYTES = 1767 * 1.25

check_interrupt = comfy.model_management.throw_exception_if_processing_interrupted


@dataclass(frozen=True)
class AutoencoderHandle:
    """What travels along a DAVAE link.

    Attributes:
        model: the DA-VAE.
        patcher: ComfyUI's handle on its memory.
        name: the file it came from.
    """

    model: DAVAE
    patcher: comfy.model_patcher.ModelPatcher
    name: str

    @property
    def latent(self) -> LatentSpec:
        """Channels, scale and normalisation of the latent."""
        return self.model.latent

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.model.parameters()).dtype

    def encode(self, image: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """Image to latent, in strips where memory is short.

        Args:
            image: ``[B, H, W, 3]`` in [0, 1]; H and W multiples of f s.
            base: ``[B, C, H/(f s), W/(f s)]`` to use as the base channels, instead of encoding the small image.

        Returns:
            ``[B, C + D, H/(f s), W/(f s)]``.
        """
        x = image.movedim(-1, 1) * 2 - 1
        bases = [None] * len(x) if base is None else list(base.expand(len(x), -1, -1, -1).split(1))
        z = self._run(
            list(zip(x.split(1), bases, strict=True)),
            lambda part, z_base: self.model.encode(part, z_base=z_base),
            partial(self.model.encode_tiled, on_strip=check_interrupt),
            ENCODE_BYTES * x.shape[2] * x.shape[3],
        )
        if base is not None:
            z[:, : self.latent.base_channels] = base  # as given, not rounded to the model's dtype
        return z

    def decode(self, z: torch.Tensor, detail_strength: float = 1.0) -> torch.Tensor:
        """Latent ``[B, C + D, h, w]`` to image ``[B, f s h, f s w, 3]`` in [0, 1], in strips where memory is short."""
        note_decoded(z, self.model, self.name)
        x = self._run(
            [(part, detail_strength) for part in z.split(1)],
            self.model.decode,
            partial(self.model.decode_tiled, on_strip=check_interrupt),
            DECODE_BYTES * self.latent.factor**2 * z.shape[2] * z.shape[3],
        )
        return to_unit_range(x).movedim(1, -1)

    def _run(
        self,
        calls: list[tuple],
        whole: Callable[..., torch.Tensor],
        tiled: Callable[..., torch.Tensor],
        elements: float,
    ) -> torch.Tensor:
        """One picture after the other, whole where ``elements`` numbers fit into memory and in strips where not.

        Args:
            calls: the arguments for each picture; tensors are brought to the model.
            whole, tiled: take those arguments.
            elements: numbers of working memory a picture takes.

        Returns:
            The batch, on ComfyUI's device for intermediates.
        """
        management = comfy.model_management
        device = self.patcher.load_device
        need = elements * management.dtype_size(self.dtype)
        management.load_models_gpu([self.patcher], memory_required=need, force_full_load=True)
        if need <= management.get_free_memory(device):
            try:
                return self._each(whole, calls)
            except torch.cuda.OutOfMemoryError:
                logging.warning("DA-VAE: out of memory, working in strips instead (same result, slower)")
            management.soft_empty_cache()
        return self._each(tiled, calls)

    def _each(self, function: Callable[..., torch.Tensor], calls: list[tuple]) -> torch.Tensor:
        """``function`` on each picture's arguments, as a batch on ComfyUI's device for intermediates."""
        management = comfy.model_management
        out = []
        for call in calls:
            check_interrupt()
            arguments = [v.to(self.patcher.load_device, self.dtype) if isinstance(v, torch.Tensor) else v for v in call]
            out.append(function(*arguments).to(management.intermediate_device(), intermediate_dtype()))
        return torch.cat(out)

    def stock_vae(self) -> comfy.sd.VAE:
        """The whole DA-VAE as a VAE that stock nodes accept."""
        vae = self._stock(_JointStage(self.model, self.name), self.latent.channels, self.latent.factor, 1.0)
        vae.encode_tiled_, vae.decode_tiled_ = self._stock_encode_tiled, self._stock_decode_tiled
        return vae

    def base_vae(self) -> comfy.sd.VAE:
        """The base VAE inside the DA-VAE, for half-size images; it decodes only if the file holds the base decoder."""
        return self._stock(_BaseStage(self.model, self.name), self.latent.base_channels, self.latent.base_factor, 0.8)

    def _stock_encode_tiled(self, pixels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """In place of the stock VAE's tiling: strips give the exact latent, whatever tile size is asked for.

        Takes ``[B, 3, H, W]`` in [0, 1].
        """
        encode = partial(self.model.encode_tiled, on_strip=check_interrupt)
        return self._each(encode, [(part,) for part in (pixels * 2 - 1).split(1)])

    def _stock_decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """In place of the stock VAE's tiling: strips give the exact image, whatever tile size is asked for.

        Gives ``[B, 3, H, W]`` in [0, 1].
        """
        self.latent.check(samples, "the LATENT")
        note_decoded(samples, self.model, self.name)
        decode = partial(self.model.decode_tiled, on_strip=check_interrupt)
        return to_unit_range(self._each(decode, [(part,) for part in samples.split(1)]))

    def _stock(self, stage: nn.Module, channels: int, factor: int, encode_share: float) -> comfy.sd.VAE:
        """ComfyUI's VAE object around one of our faces.

        The object is built by ComfyUI around a minute model and keeps every attribute it got there, in any version;
        only what concerns our model is replaced.
        """
        vae = _minute_vae()
        vae.first_stage_model = stage
        vae.patcher = self.patcher
        vae.vae_dtype = self.dtype
        vae.device = self.patcher.load_device
        vae.latent_channels = channels
        vae.downscale_ratio = vae.upscale_ratio = factor
        vae.disable_offload = True  # our layers are ordinary torch layers, which cannot be loaded one by one
        vae.size = comfy.model_management.module_size(self.model)
        size_of = comfy.model_management.dtype_size
        vae.memory_used_encode = lambda shape, dtype: ENCODE_BYTES * encode_share * shape[2] * shape[3] * size_of(dtype)
        vae.memory_used_decode = lambda shape, dtype: DECODE_BYTES * factor**2 * shape[2] * shape[3] * size_of(dtype)
        return vae


def load_autoencoder(path: Path, dtype: torch.dtype | None = None) -> AutoencoderHandle:
    """Load a DA-VAE under ComfyUI's memory management.

    Args:
        path: a safetensors file of kind ``autoencoder``.
        dtype: of the weights; chosen by ComfyUI for the device when not given.

    Raises:
        CheckpointError: the file cannot be read or is of another kind.
    """
    management = comfy.model_management
    device = management.vae_device()
    dtype = dtype or management.vae_dtype(device, [torch.bfloat16, torch.float32])
    model = checkpoints.load_autoencoder(path, dtype).requires_grad_(False)
    offload = management.vae_offload_device()
    patcher = comfy.model_patcher.ModelPatcher(model.to(offload), load_device=device, offload_device=offload)
    return AutoencoderHandle(model, patcher, path.name)


def to_unit_range(x: torch.Tensor) -> torch.Tensor:
    """From about [-1, 1] to [0, 1]."""
    return ((x + 1) / 2).clamp_(0, 1)


class _Stage(nn.Module):
    """What a stock VAE object calls its first-stage model: a face of the DA-VAE, which it does not own."""

    model: DAVAE

    def __init__(self, model: DAVAE, name: str) -> None:
        super().__init__()
        self.name = name
        self.__dict__["model"] = model  # not a submodule: the DA-VAE's own patcher moves its weights

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The DA-VAE's tensors, for nodes that save a VAE."""
        return self.model.state_dict(*args, **kwargs)


class _JointStage(_Stage):
    """The whole DA-VAE, in the stock conventions: images in [-1, 1], latents unnormalised."""

    def encode(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.model.encode(x)

    def decode(self, z: torch.Tensor, **_: Any) -> torch.Tensor:
        self.model.latent.check(z, "the LATENT")
        note_decoded(z, self.model, self.name)
        return self.model.decode(z)


class _BaseStage(_Stage):
    """The base VAE alone."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The base VAE's tensors under the names of its own file."""
        state = self.model.state_dict(*args, **kwargs)
        return {name.removeprefix("base_"): tensor for name, tensor in state.items() if name.startswith("base_")}

    def encode(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.model.encode_small(x)

    def decode(self, z: torch.Tensor, **_: Any) -> torch.Tensor:
        channels = self.model.latent.base_channels
        if z.shape[1] != channels:
            raise LatentError(
                f"the base VAE decodes latents of {channels} channels, the LATENT has {z.shape[1]}; take its base with "
                "DA-VAE to Base Latent, or decode all of it with the VAE output of the DA-VAE Loader"
            )
        return self.model.decode_base(z)


def _minute_vae() -> comfy.sd.VAE:
    """A stock VAE object around the smallest autoencoder its constructor takes."""
    tiny = Autoencoder(AutoencoderConfig(widths=(32,), blocks=1, latent_channels=4, quant_conv=True))
    shape = {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    return comfy.sd.VAE(sd=tiny.state_dict(), config={"params": {"ddconfig": shape, "embed_dim": 4}})
