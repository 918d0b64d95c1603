"""What reads files, and whether what came out of a damaged one makes sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from davae_core import checkpoints
from davae_core.adapter import merge as merged
from davae_core.checkpoints import convert, identify, inspect, lora
from davae_core.checkpoints import merge as merging
from davae_core.checkpoints.authors_autoencoder import STATISTICS
from davae_core.davae import DAVAE
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig

from .originals import FAMILY


class WrongError(Exception):
    """What came out of an accepted file makes no sense."""


@dataclass(frozen=True)
class Subject:
    """Something that reads a file or folder.

    Attributes:
        name: for the report.
        original: the file or folder that it reads, of those that ``originals`` makes.
        spoiled: the files that may be spoiled, below the original; ("",) for the original itself.
        looks: it reads names and shapes alone, so that it cannot tell whether numbers are damaged.
        read: takes the place of the spoiled copy and a folder to write to; raises WrongError for nonsense.
    """

    name: str
    original: str
    spoiled: tuple[str, ...]
    read: Callable[[Path, Path, Path], None]
    looks: bool = False


def _finite(state: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise WrongError(f"{name} is not finite")


def _latent(spec: LatentSpec, recommended: Any = None) -> None:
    numbers = [*spec.detail_mean, *spec.detail_std, *spec.preview]
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise WrongError(f"latent {spec}")
    if spec.base_factor not in (1, 2, 4, 8, 16, 32, 64):
        raise WrongError(f"factor {spec.base_factor}")
    if recommended is not None:
        for value, most in (
            (recommended.size, 65536), (recommended.shift, 100), (recommended.cfg, 100), (recommended.steps, 10000)
        ):  # fmt: skip
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise WrongError(f"recommended {recommended}")


def _autoencoder(path: Path, _: Path, __: Path) -> None:
    model: DAVAE = checkpoints.load_autoencoder(path, torch.float32)
    _latent(model.latent)
    _finite(model.state_dict())
    if model.latent.channels <= 64 and model.latent.factor <= 64:
        image = model.decode(torch.zeros(1, model.latent.channels, 1, 1))
        if image.shape != (1, model.config.base.image_channels, model.latent.factor, model.latent.factor):
            raise WrongError(f"an image of shape {list(image.shape)}")


def _adapter(path: Path, _: Path, __: Path) -> None:
    adapter = checkpoints.load_adapter(path)
    _latent(adapter.config.latent, adapter.config.recommended)
    _finite(adapter.state)
    if adapter.config.hidden == FAMILY.model.hidden and adapter.config.latent.base_channels == 16:
        state = {name: tensor.clone() for name, tensor in _base().items()}
        _run(merged(state, adapter), adapter.config.latent)


_BASE: dict[str, torch.Tensor] = {}


def _base() -> dict[str, torch.Tensor]:
    if not _BASE:
        _BASE.update(FAMILY.diffusion_model().state_dict())
    return _BASE


def _run(state: Mapping[str, torch.Tensor], spec: LatentSpec) -> None:
    config = MMDiTConfig.from_state_dict(state)
    with torch.device("meta"):
        model = MMDiT(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False, assign=True)
    x = torch.zeros(1, spec.channels, 2, 2)
    out = model(x, torch.zeros(1), torch.zeros(1, 1, config.context), torch.zeros(1, config.pooled))
    if out.shape != x.shape:
        raise WrongError(f"a prediction of shape {list(out.shape)}")


def _few_step_lora(path: Path, _: Path, __: Path) -> None:
    lora = checkpoints.load_few_step_lora(path)
    _latent(lora.latent, lora.recommended)
    _finite(lora.state)
    if lora.hidden == FAMILY.model.hidden and lora.latent.channels == FAMILY.latent.channels:
        _run(lora.added(merged(dict(_base()), FAMILY.adapter())), FAMILY.latent)


def _merged(path: Path, _: Path, __: Path) -> None:
    model = checkpoints.load_merged(path)
    _latent(model.latent, model.recommended)
    _run(model.state, model.latent)


def _text_encoder(path: Path, _: Path, __: Path) -> None:
    model = checkpoints.load_text_encoder(path).float()
    _finite(model.state_dict())
    context, pooled = model(torch.tensor([model.pad(model.tokenize("3d peach"))]))
    _finite({"context": context, "pooled": pooled})


def _predictor(path: Path, _: Path, __: Path) -> None:
    model = checkpoints.load_predictor(path, torch.float32)
    _latent(model.latent)
    _finite(model.state_dict())
    z = model.complete(torch.zeros(1, model.latent.base_channels, 2, 2))
    if z.shape != (1, model.latent.channels, 2, 2):
        raise WrongError(f"a latent of shape {list(z.shape)}")


def _tiny_decoder(path: Path, _: Path, __: Path) -> None:
    model = checkpoints.load_tiny_decoder(path, torch.float32)
    _latent(model.latent)
    _finite(model.state_dict())
    factor = model.latent.factor
    picture = model.decode(torch.zeros(1, model.latent.channels, 2, 2))
    if picture.shape != (1, 3, 2 * factor, 2 * factor):
        raise WrongError(f"a picture of shape {list(picture.shape)}")


def _inspect(path: Path, _: Path, __: Path) -> None:
    inspect.text(inspect.describe(path))


def _verify(path: Path, _: Path, __: Path) -> None:
    inspect.verify(path)


def _lora(path: Path, _: Path, __: Path) -> None:
    state = lora.read(path)
    if not all(type(tensor) is torch.Tensor for tensor in state.values()):
        raise WrongError("no tensors")


def _converter(*options: str) -> Callable[[Path, Path, Path], None]:
    def run(path: Path, out: Path, originals: Path) -> None:
        base = str(originals / "base.safetensors")
        given = [option.replace("BASE", base).replace("ORIGINAL", str(path)) for option in options]
        written = convert.main([str(path), str(out / "written"), *given])
        for place in written:
            if place.suffix == ".safetensors":
                inspect.verify(place)

    return run


def _merge_base(path: Path, out: Path, originals: Path) -> None:
    merging.main([str(path), str(originals / "adapter.safetensors"), str(out / "m.safetensors")])
    _merged(out / "m.safetensors", out, originals)


def _merge_adapter(path: Path, out: Path, originals: Path) -> None:
    merging.main([str(originals / "base.safetensors"), str(path), str(out / "m.safetensors")])
    _merged(out / "m.safetensors", out, originals)


def _identify(path: Path, _: Path, __: Path) -> None:
    identify(path, "base_model")


ITSELF = ("",)
_SHARDS = ("model-1-of-2.safetensors", "diffusion_pytorch_model.safetensors.index.json")
_PIPELINE = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/config.json",
)
_LORA = ("adapter_model.safetensors", "adapter_config.json", "adapter_config.json")

SUBJECTS: tuple[Subject, ...] = (
    Subject("load autoencoder", "autoencoder.safetensors", ITSELF, _autoencoder),
    Subject("load autoencoder with a predictor", "residual.safetensors", ITSELF, _autoencoder),
    Subject("load adapter", "adapter.safetensors", ITSELF, _adapter),
    Subject("load few-step LoRA", "few_steps.safetensors", ITSELF, _few_step_lora),
    Subject("load merged", "merged.safetensors", ITSELF, _merged),
    Subject("load text encoder", "text_encoder.safetensors", ITSELF, _text_encoder),
    Subject("load predictor", "predictor.safetensors", ITSELF, _predictor),
    Subject("load tiny decoder", "tiny_decoder.safetensors", ITSELF, _tiny_decoder),
    Subject("inspect", "tiny_decoder.safetensors", ITSELF, _inspect, True),
    Subject("inspect", "autoencoder.safetensors", ITSELF, _inspect, True),
    Subject("inspect", "adapter.safetensors", ITSELF, _inspect, True),
    Subject("inspect", "few_steps.safetensors", ITSELF, _inspect, True),
    Subject("inspect", "whole.safetensors", ITSELF, _inspect, True),
    Subject("inspect", "shards", _SHARDS, _inspect, True),
    Subject("verify", "adapter.safetensors", ITSELF, _verify),
    Subject("LoRA", "lora", _LORA, _lora),
    Subject("identify", "whole.safetensors", ITSELF, _identify, True),
    Subject("convert base", "base.safetensors", ITSELF, _converter()),
    Subject("convert VAE", "vae.safetensors", ITSELF, _converter()),
    Subject("convert checkpoint", "whole.safetensors", ITSELF, _converter()),
    Subject("convert shards", "shards", _SHARDS, _converter()),
    Subject("convert folder", "pipeline", _PIPELINE, _converter()),
    Subject("convert merged folder", "merged_pipeline", ("davae.json", "davae.json", _PIPELINE[0]), _converter()),
    Subject("convert to diffusers", "autoencoder.safetensors", ITSELF, _converter("--to", "diffusers")),
    Subject("convert to diffusers", "adapter.safetensors", ITSELF, _converter("--to", "diffusers")),
    Subject("convert to diffusers", "residual.safetensors", ITSELF, _converter("--to", "diffusers")),
    Subject("convert to diffusers", "few_steps.safetensors", ITSELF, _converter("--to", "diffusers")),
    Subject("authors' autoencoder", "authors_autoencoder", ("pytorch_model.bin", STATISTICS), _converter()),
    Subject(
        "authors' adapter",
        "authors_adapter",
        ("latest.pt", STATISTICS, *(f"lora_weights/{name}" for name in _LORA)),
        _converter("--base", "BASE", "--lora", "ORIGINAL/lora_weights"),
    ),
    Subject("merge base", "base.safetensors", ITSELF, _merge_base),
    Subject("merge adapter", "adapter.safetensors", ITSELF, _merge_adapter),
)

# What opens files in the graph, and what is quick, more often than what runs whole models.
_OFTEN = ("load adapter", "load merged", "load text encoder", "inspect", "LoRA", "merge adapter")
TURNS: tuple[Subject, ...] = SUBJECTS + 3 * tuple(subject for subject in SUBJECTS if subject.name in _OFTEN)
