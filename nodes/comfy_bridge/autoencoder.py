"""A DA-VAE in ComfyUI: one set of weights under one patcher, seen as DAVAE, as a stock VAE, and as the base VAE."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ...davae_core import checkpoints
from ...davae_core.davae import DAVAE, DEFAULT_ROWS, FEWEST_ROWS
from ...davae_core.latent import LatentSpec
from ...davae_core.memory import decode_bytes, encode_bytes
from .history import note_decoded
from .memory import Way, Ways
from .vae import BaseStage, JointStage, stock_vae, to_unit_range
from .versions import intermediate_dtype

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
        z = self.run(self.encoding(*x.shape[2:]), list(zip(x.split(1), bases, strict=True)))
        if base is not None:
            z[:, : self.latent.base_channels] = base  # as given, not rounded to the model's dtype
        return z

    def decode(self, z: torch.Tensor, detail_strength: float = 1.0) -> torch.Tensor:
        """Latent ``[B, C + D, h, w]`` to image ``[B, f s h, f s w, 3]`` in [0, 1], in strips where memory is short."""
        note_decoded(z, self.model, self.name)
        x = self.run(self.decoding(*z.shape[2:]), [(part, detail_strength) for part in z.split(1)])
        return to_unit_range(x).movedim(1, -1)

    def encoding(self, height: int, width: int) -> Ways:
        """Ways to encode an image of this size in pixels, called as ``(x, z_base=None)``."""
        model = self.model
        return self._ways(
            encode_bytes, height, width, lambda x, z_base=None: model.encode(x, z_base=z_base), model.encode_tiled
        )

    def decoding(self, height: int, width: int) -> Ways:
        """Ways to decode a latent of this size in latent pixels, called as ``(z, detail_strength=1)``."""
        model, factor = self.model, self.latent.factor
        return self._ways(decode_bytes, height * factor, width * factor, model.decode, model.decode_tiled)

    def base_encoding(self, height: int, width: int) -> Ways:
        """Ways to encode an image of this size in pixels with the base VAE, called as ``(x)``."""
        model = self.model
        return self._ways(encode_bytes, height, width, model.encode_small, model.encode_small_tiled)

    def base_decoding(self, height: int, width: int) -> Ways:
        """Ways to decode a base latent of this size in latent pixels with the base VAE, called as ``(z_base)``."""
        model, factor = self.model, self.latent.base_factor
        return self._ways(decode_bytes, height * factor, width * factor, model.decode_base, model.decode_base_tiled)

    def _ways(
        self,
        estimate: Callable[..., int],
        height: int,
        width: int,
        whole: Callable[..., torch.Tensor],
        tiled: Callable[..., torch.Tensor],
    ) -> Ways:
        """Whole, in strips, and in fewer rows still, for an image of this size in pixels."""
        need = partial(estimate, self.model.config.base, height, width, self.dtype.itemsize)
        strips = (
            Way(f"in strips of {rows} rows", need(rows), partial(tiled, rows=rows, on_strip=check_interrupt))
            for rows in (DEFAULT_ROWS, FEWEST_ROWS)
        )
        return Ways(self.patcher, [Way("on the whole image", need(), whole), *strips])

    def run(self, ways: Ways, calls: list[tuple]) -> torch.Tensor:
        """Load the model and do one picture after the other; ``calls`` are the arguments for each."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=ways.need(), force_full_load=True)
        return self.each(ways, calls)

    def each(self, function: Callable[..., torch.Tensor], calls: list[tuple]) -> torch.Tensor:
        """``function`` on each picture's arguments, as a batch on ComfyUI's device for intermediates; the model must be
        loaded."""
        management = comfy.model_management
        out = []
        for call in calls:
            check_interrupt()
            arguments = [v.to(self.patcher.load_device, self.dtype) if isinstance(v, torch.Tensor) else v for v in call]
            out.append(function(*arguments).to(management.intermediate_device(), intermediate_dtype()))
        return torch.cat(out)

    def stock_vae(self) -> comfy.sd.VAE:
        """The whole DA-VAE as a VAE that stock nodes accept."""
        return stock_vae(JointStage(self))

    def base_vae(self) -> comfy.sd.VAE:
        """The base VAE inside the DA-VAE, for half-size images; it decodes only if the file holds the base decoder."""
        return stock_vae(BaseStage(self))


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
