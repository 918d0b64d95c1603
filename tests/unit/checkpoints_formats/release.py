"""The authors' release at reduced width, from its documented names, and its forward pass on diffusers' own modules."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from torch import nn

State = dict[str, torch.Tensor]
MEAN = tuple(0.1 * i - 0.8 for i in range(16))
STD = tuple(0.5 + 0.1 * i for i in range(16))
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear"]


def autoencoder_state(trained: AutoencoderKL, original: AutoencoderKL, scale: int = 2) -> State:
    """The tensors of ``pytorch_model.bin``: C = 16, D = C (s - 1)."""
    draw = torch.Generator().manual_seed(11)
    width, detail = trained.config.block_out_channels[-1], 16 * (scale - 1)
    state = {f"vae.{name}": tensor for name, tensor in trained.state_dict().items()}
    state |= {f"original_vae_model.vae.{name}": tensor for name, tensor in original.state_dict().items()}
    for name, out, channels in (
        ("dc_down", 2 * detail // scale**2, width),
        ("dc_up", width * scale**2, 16 + detail),
    ):
        state[f"{name}.conv.weight"] = torch.randn(out, channels, 3, 3, generator=draw) * 0.05
        state[f"{name}.conv.bias"] = torch.randn(out, generator=draw) * 0.1
    if width * scale**2 % (2 * detail):  # channels do not fall into groups
        state["dc_down.shortcut_proj.weight"] = torch.randn(2 * detail, width * scale**2, 1, 1, generator=draw) * 0.05
    return state


def encode(vae: AutoencoderKL, original: AutoencoderKL, state: State, image: torch.Tensor, scale: int) -> torch.Tensor:
    """Image in [0, 1] to the latent that the release's diffusion model sees, [detail, base], detail not normalised."""
    encoder = vae.encoder
    h = encoder.conv_in(2 * image - 1)
    for block in encoder.down_blocks:
        h = block(h)
    h = encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(h)))
    conv = F.conv2d(h, state["dc_down.conv.weight"], state["dc_down.conv.bias"], padding=1)
    moments = F.pixel_unshuffle(conv, scale)
    shortcut = F.pixel_unshuffle(h, scale)
    if "dc_down.shortcut_proj.weight" in state:
        moments = moments + F.conv2d(shortcut, state["dc_down.shortcut_proj.weight"])
    else:
        moments = moments + shortcut.unflatten(1, (moments.shape[1], -1)).mean(dim=2)
    small = F.interpolate(image, [side // scale for side in image.shape[-2:]], mode="bicubic", align_corners=False)
    base = original.encode(2 * small.clamp(0, 1) - 1).latent_dist.mode()
    base = (base - original.config.shift_factor) * original.config.scaling_factor
    return torch.cat([moments.chunk(2, dim=1)[0], base], dim=1)


def decode(vae: AutoencoderKL, state: State, z: torch.Tensor, scale: int) -> torch.Tensor:
    """[detail, base] to an image in [0, 1]."""
    h = F.conv2d(z, state["dc_up.conv.weight"], state["dc_up.conv.bias"], padding=1)
    h = h + z.repeat_interleave(h.shape[1] // z.shape[1], dim=1)
    h = vae.decoder.mid_block(F.pixel_shuffle(h, scale))
    for block in vae.decoder.up_blocks:
        h = block(h)
    h = vae.decoder.conv_out(vae.decoder.conv_act(vae.decoder.conv_norm_out(h)))
    return ((h + 1) / 2).clamp(0, 1)


def write_statistics(folder: Path, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Path:
    path = folder / "latent_norm_stats.json"
    path.write_text(json.dumps({"mean": list(mean), "std": list(std)}))
    return path


class TwoConvs(nn.Module):
    """The release's embedder: the last channels are the base, both outputs are added."""

    def __init__(self, base: nn.Conv2d, extra: nn.Conv2d) -> None:
        super().__init__()
        self.base_conv, self.extra_conv = base, extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        detail = self.extra_conv.in_channels
        return self.base_conv(x[:, detail:]) + self.extra_conv(x[:, :detail])


class TwoHeads(nn.Module):
    """The release's head: per patch position [detail, base]."""

    def __init__(self, base: nn.Linear, extra: nn.Linear) -> None:
        super().__init__()
        self.base_linear, self.extra_linear = base, extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [layer(x).unflatten(-1, (4, -1)) for layer in (self.extra_linear, self.base_linear)]
        return torch.cat(parts, dim=-1).flatten(-2)


def adapt(model: SD3Transformer2DModel, detail: int = 16, rank: int = 4, alpha: int = 4) -> SD3Transformer2DModel:
    """Give a transformer the release's two branches and LoRA, as after a training."""
    draw = torch.Generator().manual_seed(12)
    hidden = model.inner_dim
    model.pos_embed.proj = TwoConvs(model.pos_embed.proj, nn.Conv2d(detail, hidden, 2, stride=2))
    model.proj_out = TwoHeads(model.proj_out, nn.Linear(hidden, 4 * detail))
    model.out_channels += detail
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=TARGETS)
    model.add_adapter(config, adapter_name="default")
    for name, tensor in model.named_parameters():
        if ".lora_" in name or name.startswith(("pos_embed.proj.", "proj_out.")):
            tensor += torch.randn(tensor.shape, generator=draw) * 0.05
    return model.eval()


def checkpoint(model: SD3Transformer2DModel, step: int = 7) -> dict[str, Any]:
    """The content of ``latest.pt``."""
    state = {f"tokenizer_patch_embed.{name}": tensor for name, tensor in model.pos_embed.state_dict().items()}
    state |= {f"project_out.{name}": tensor for name, tensor in model.proj_out.state_dict().items()}
    return {"global_step": step, "timestamp": 1.0, "model_state_dict": state}


def trained_parameters(model: SD3Transformer2DModel) -> State:
    """What the release keeps a running average of, by the names of its training's modules."""
    return {
        f"transformer.transformer.{name}": tensor.detach().float().clone()
        for name, tensor in model.named_parameters()
        if ".lora_" in name or name.startswith(("pos_embed.proj.", "proj_out."))
    }
