"""A family of untrained models (random weights in the true layouts), small enough for tests.

Random weights prove the wiring, nothing more: what such models draw is noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from davae_core.adapter import Adapter, Recommended, merge, zero_adapter
from davae_core.autoencoder import AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.few_steps import FewStepLora
from davae_core.history import History, Identity, Role, identity
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig, sincos_grid
from davae_core.predictor import DetailPredictor, PredictorConfig
from davae_core.text_encoder import TextEncoder, TextEncoderConfig


@dataclass(frozen=True)
class Family:
    """A base model, a DA-VAE, adapters and a merged model that belong together.

    Attributes:
        seed: of all weights.
        base: the base VAE.
        model: the diffusion model.
    """

    seed: int = 0
    base: AutoencoderConfig = AutoencoderConfig(widths=(32, 32, 32, 64), blocks=1)
    model: MMDiTConfig = MMDiTConfig(hidden=128, depth=2, grid=24, context=64, pooled=32, dual_attention=(0,))
    recommended: Recommended = Recommended(size=256, shift=2.0, cfg=2.0, steps=3)
    words: tuple[str, ...] = ("3d", "flat", "peach", "rocket")

    model_file: str = field(default="davae_toy_sd35.safetensors", init=False)
    text_file: str = field(default="davae_toy_text_encoder.safetensors", init=False)
    davae_file: str = field(default="davae_toy_autoencoder.safetensors", init=False)
    adapter_file: str = field(default="davae_toy_adapter.safetensors", init=False)
    zero_adapter_file: str = field(default="davae_toy_zero_adapter.safetensors", init=False)
    merged_file: str = field(default="davae_toy_merged.safetensors", init=False)
    predictor_file: str = field(default="davae_toy_predictor.safetensors", init=False)
    few_steps_file: str = field(default="davae_toy_few_steps.safetensors", init=False)

    @property
    def latent(self) -> LatentSpec:
        """16 + 16 channels at half the base's scale, with made-up detail statistics."""
        generator = torch.Generator().manual_seed(self.seed)
        return LatentSpec(
            base_channels=self.base.latent_channels,
            detail_channels=self.base.latent_channels,
            base_factor=self.base.factor,
            detail_mean=tuple(torch.randn(self.base.latent_channels, generator=generator).tolist()),
            detail_std=tuple(torch.empty(self.base.latent_channels).uniform_(0.5, 2, generator=generator).tolist()),
        )

    def diffusion_model(self) -> MMDiT:
        """The unadapted model."""
        torch.manual_seed(self.seed)
        model = MMDiT(self.model)
        model.get_buffer("pos_embed").copy_(sincos_grid(self.model.grid, self.model.hidden))
        return model.eval()

    def davae(self) -> DAVAE:
        """The autoencoder, with a base decoder."""
        torch.manual_seed(self.seed + 1)
        return DAVAE(DAVAEConfig(base=self.base, latent=self.latent, base_decoder=True)).eval()

    def adapter(self, zero: bool = False) -> Adapter:
        """An adapter that changes everything it can, or the one of step 0."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        blank = zero_adapter(self.model, self.latent, rank=4, generator=generator)
        config = replace(blank.config, recommended=self.recommended)
        if zero:
            return Adapter(config, blank.state)
        state = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            if tensor.ndim and not tensor.any()
            else tensor
            for name, tensor in blank.state.items()
        }
        return Adapter(config, state)

    def few_steps(self) -> FewStepLora:
        """A few-step LoRA for the adapted model, whose settings are not the adapter's."""
        generator = torch.Generator().manual_seed(self.seed + 5)
        blank = zero_adapter(self.model, self.latent, rank=4, generator=generator).lora_state()
        state = {
            name: 0.05 * torch.randn(tensor.shape, generator=generator) if name.endswith("lora_B.weight") else tensor
            for name, tensor in blank.items()
        }
        told = replace(self.recommended, shift=1.5 * self.recommended.shift, cfg=1.0, steps=2)
        of: dict[Role, Identity] = {"adapted_model": identity("adapted_model", self.merged().state, "the toy adapter")}
        return FewStepLora(self.latent, told, state, History(steps=1, of=of))

    def predictor(self) -> DetailPredictor:
        """A predictor of the DA-VAE's detail, none of whose layers is zero."""
        torch.manual_seed(self.seed + 4)
        model = DetailPredictor(PredictorConfig(self.latent, width=64, blocks=1))
        torch.nn.init.normal_(model.conv_out.weight, std=0.05)
        return model.eval()

    def merged(self) -> checkpoints.MergedModel:
        """The model with the adapter merged into it."""
        state = merge(self.diffusion_model().state_dict(), self.adapter())
        return checkpoints.MergedModel(state, self.latent, self.recommended)

    def text_encoder(self) -> TextEncoder:
        """The text encoder that belongs to the model."""
        torch.manual_seed(self.seed + 3)
        return TextEncoder(TextEncoderConfig(self.words, context=self.model.context, pooled=self.model.pooled)).eval()

    def write(self, models: Path) -> None:
        """Put all files into the folders of a ComfyUI ``models`` directory, where they are not there yet."""
        files: dict[Path, Callable[[Path], None]] = {
            models / "diffusion_models" / self.model_file: self._write_model,
            models / "text_encoders" / self.text_file: lambda path: checkpoints.save_text_encoder(
                path, self.text_encoder()
            ),
            models / "vae" / self.davae_file: lambda path: checkpoints.save_autoencoder(path, self.davae()),
            models / "loras" / self.adapter_file: lambda path: checkpoints.save_adapter(path, self.adapter()),
            models / "loras" / self.zero_adapter_file: lambda path: checkpoints.save_adapter(
                path, self.adapter(zero=True)
            ),
            models / "latent_upscale_models" / self.predictor_file: lambda path: checkpoints.save_predictor(
                path, self.predictor()
            ),
            models / "loras" / self.few_steps_file: lambda path: checkpoints.save_few_step_lora(path, self.few_steps()),
            models / "diffusion_models" / self.merged_file: lambda path: checkpoints.save_merged(path, self.merged()),
        }
        for path, make in files.items():
            _write_once(path, make)

    def _write_model(self, path: Path) -> None:
        save_file(self.diffusion_model().state_dict(), path)


def _write_once(path: Path, make: Callable[[Path], None]) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
