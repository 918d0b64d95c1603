"""Our own files: autoencoder, adapter and merged model, each one safetensors file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapter import Adapter, AdapterConfig, Recommended
from ..davae import DAVAE, DAVAEConfig
from ..errors import CheckpointError
from ..few_steps import FewStepLora
from ..history import History
from ..latent import LatentSpec
from ..lora import check_lora, lora_width
from ..mmdit import MMDiT, MMDiTConfig
from ..predictor import DetailPredictor, PredictorConfig
from ..shapes import dims
from ..text_encoder import TextEncoder, TextEncoderConfig
from ..tiny_decoder import TinyDecoder, TinyDecoderConfig
from . import files, layout, metadata
from .detect import CHECKPOINT_PREFIXES, FileKind, detect

PathLike = str | os.PathLike[str]

_WHERE = {
    "autoencoder": "choose a DA-VAE autoencoder (models/vae)",
    "adapter": "choose a DA-VAE adapter (models/loras)",
    "few_step_lora": "choose a few-step LoRA (models/loras)",
    "predictor": "choose a DA-VAE detail predictor (models/latent_upscale_models)",
    "tiny_decoder": "choose a tiny decoder of DA-VAE latents (models/vae_approx)",
    "model": "choose a merged DA-VAE model (models/diffusion_models)",
    "text_encoder": "choose the tiny model's text encoder (models/text_encoders)",
}

# Files that lie in one folder and are easily taken for one another: what to do with the first, where the second is
# asked for.
_OTHERWISE = {
    ("few_step_lora", "adapter"): ", and put this file on the adapted model with the node Few-Step LoRA",
    ("adapter", "few_step_lora"): "; adapters go into the node DA-VAE Adapter, before it",
    ("lora", "few_step_lora"): "; other LoRAs go into ComfyUI's own LoRA loaders",
}


def save_autoencoder(
    path: PathLike,
    model: DAVAE,
    recommended: Recommended = Recommended(),
    *,
    title: str = "DA-VAE autoencoder",
    author: str = "",
    licence: str = "",
    history: History | None = None,
) -> None:
    """Write a DA-VAE with its configuration; the old file stays until the new one is whole."""
    config = metadata.latent_config(model.latent, recommended)
    info = metadata.build("autoencoder", config, title=title, author=author, licence=licence, history=history)
    files.save(path, model.state_dict(), info)


def load_autoencoder(path: PathLike, dtype: torch.dtype | None = None) -> DAVAE:
    """Read a DA-VAE.

    Args:
        path: a safetensors file of kind ``autoencoder``.
        dtype: of the weights; as stored when not given.

    Raises:
        CheckpointError: the file cannot be read, is of another kind, contradicts itself, or holds NaN.
    """
    meta, info, name = _header(path, "autoencoder")
    latent, _ = metadata.latent_of(metadata.parse(info, "autoencoder", name), name)
    metadata.history_of(info, name)
    with files.naming(name):
        config = DAVAEConfig.from_state_dict(meta)
        _agree(config.latent, latent, ("base_channels", "detail_channels", "scale", "base_factor"))
        with torch.device("meta"):
            model = DAVAE(replace(config, latent=latent))
    layout.check(meta, model, name)
    model.load_state_dict(_tensors(path, info), assign=True)
    return model.to(dtype).eval() if dtype else model.eval()


def save_adapter(
    path: PathLike,
    adapter: Adapter,
    *,
    title: str = "DA-VAE adapter",
    author: str = "",
    licence: str = "",
    history: History | None = None,
) -> None:
    """Write an adapter with its configuration; the old file stays until the new one is whole.

    ``history`` is the adapter's own where it is not given.
    """
    config = adapter.config
    told = metadata.latent_config(config.latent, config.recommended)
    by = {"title": title, "author": author, "licence": licence}
    info = metadata.build("adapter", told, **by, history=history or adapter.history)
    files.save(path, adapter.state, info)


def load_adapter(path: PathLike) -> Adapter:
    """Read an adapter; raises as :func:`load_autoencoder` does."""
    meta, info, name = _header(path, "adapter")
    latent, recommended = metadata.latent_of(metadata.parse(info, "adapter", name), name)
    history = metadata.history_of(info, name)
    with files.naming(name):
        found = AdapterConfig.from_state_dict(meta, latent.base_channels)
        _agree(found.latent, latent, ("base_channels", "detail_channels"))
    layout.check_floats({key: tensor for key, tensor in meta.items() if not key.endswith(".alpha")}, name)
    return Adapter(replace(found, latent=latent, recommended=recommended), _tensors(path, info), history)


def save_few_step_lora(
    path: PathLike,
    lora: FewStepLora,
    *,
    title: str = "DA-VAE few-step LoRA",
    author: str = "",
    licence: str = "",
    history: History | None = None,
) -> None:
    """Write a few-step LoRA with its configuration; the old file stays until the new one is whole.

    ``history`` is the LoRA's own where it is not given.
    """
    told = metadata.latent_config(lora.latent, lora.recommended)
    by = {"title": title, "author": author, "licence": licence}
    files.save(path, lora.state, metadata.build("few_step_lora", told, **by, history=history or lora.history))


def load_few_step_lora(path: PathLike) -> FewStepLora:
    """Read a few-step LoRA; raises as :func:`load_autoencoder` does."""
    meta, info, name = _header(path, "few_step_lora")
    latent, recommended = metadata.latent_of(metadata.parse(info, "few_step_lora", name), name)
    history = metadata.history_of(info, name)
    with files.naming(name):
        check_lora(meta, lora_width(meta))
    layout.check_floats({key: tensor for key, tensor in meta.items() if not key.endswith(".alpha")}, name)
    return FewStepLora(latent, recommended, _tensors(path, info), history)


def save_predictor(
    path: PathLike,
    model: DetailPredictor,
    *,
    title: str = "DA-VAE detail predictor",
    author: str = "",
    licence: str = "",
    history: History | None = None,
) -> None:
    """Write a detail predictor with its configuration; the old file stays until the new one is whole."""
    config = metadata.latent_config(model.latent, Recommended())
    info = metadata.build("predictor", config, title=title, author=author, licence=licence, history=history)
    files.save(path, model.state_dict(), info)


def load_predictor(path: PathLike, dtype: torch.dtype | None = None) -> DetailPredictor:
    """Read a detail predictor; arguments and errors as for :func:`load_autoencoder`."""
    meta, info, name = _header(path, "predictor")
    latent, _ = metadata.latent_of(metadata.parse(info, "predictor", name), name)
    history = metadata.history_of(info, name)
    with files.naming(name):
        config = PredictorConfig.from_state_dict(meta)
        _agree(config.latent, latent, ("base_channels", "detail_channels"))
        with torch.device("meta"):
            model = DetailPredictor(replace(config, latent=latent))
    layout.check(meta, model, name)
    model.load_state_dict(_tensors(path, info), assign=True)
    model.history = history
    return model.to(dtype).eval() if dtype else model.eval()


def save_tiny_decoder(
    path: PathLike,
    model: TinyDecoder,
    *,
    title: str = "DA-VAE tiny decoder",
    author: str = "",
    licence: str = "",
    history: History | None = None,
) -> None:
    """Write a tiny decoder with its configuration; the old file stays until the new one is whole."""
    config = metadata.latent_config(model.latent, Recommended())
    info = metadata.build("tiny_decoder", config, title=title, author=author, licence=licence, history=history)
    files.save(path, model.state_dict(), info)


def tiny_decoder_config(path: PathLike) -> TinyDecoderConfig:
    """What a tiny decoder decodes, and its shape; no tensor is read. Raises as :func:`load_autoencoder` does."""
    meta, info, name = _header(path, "tiny_decoder")
    latent, _ = metadata.latent_of(metadata.parse(info, "tiny_decoder", name), name)
    with files.naming(name):
        return TinyDecoderConfig.from_state_dict(meta, latent)


def load_tiny_decoder(path: PathLike, dtype: torch.dtype | None = None) -> TinyDecoder:
    """Read a tiny decoder; arguments and errors as for :func:`load_autoencoder`."""
    meta, info, name = _header(path, "tiny_decoder")
    with torch.device("meta"):
        model = TinyDecoder(tiny_decoder_config(path))
    model.history = metadata.history_of(info, name)
    layout.check(meta, model, name)
    model.load_state_dict(_tensors(path, info), assign=True)
    return model.to(dtype).eval() if dtype else model.eval()


@dataclass(frozen=True)
class MergedModel:
    """A whole diffusion model with C + D channels: its state dict in the SD3.5 layout (no prefix) and its latent; the
    history is that of the adapter in it."""

    state: dict[str, torch.Tensor]
    latent: LatentSpec
    recommended: Recommended
    history: History | None = None


def save_merged(
    path: PathLike, model: MergedModel, *, title: str = "DA-VAE merged model", author: str = "", licence: str = ""
) -> None:
    """Write a merged model; the old file stays until the new one is whole."""
    config = metadata.latent_config(model.latent, model.recommended)
    by = {"title": title, "author": author, "licence": licence}
    info = metadata.build("model", config, **by, history=model.history)
    files.save(path, model.state, info)


def load_merged(path: PathLike) -> MergedModel:
    """Read a merged model; raises as :func:`load_autoencoder` does."""
    meta, info, name = _header(path, "model")
    latent, recommended = metadata.latent_of(metadata.parse(info, "model", name), name)
    history = metadata.history_of(info, name)
    meta = _strip(meta)
    with files.naming(name):
        config = MMDiTConfig.from_state_dict(meta)
    if config.in_channels != latent.channels or config.out_channels != latent.channels:
        raise CheckpointError(
            f"{name}: its weights read {config.in_channels} and predict {config.out_channels} channels, its "
            f"metadata says {latent.channels}; the file is damaged"
        )
    with torch.device("meta"):
        model = MMDiT(config)
    layout.check(meta, model, name, extra=True)
    state = _strip(_tensors(path, info, check=("x_embedder.proj.weight", "final_layer.linear.weight")))
    return MergedModel(state, latent, recommended, history)


def save_text_encoder(
    path: PathLike, model: TextEncoder, *, title: str = "DA-VAE tiny text encoder", author: str = "", licence: str = ""
) -> None:
    """Write the tiny model's text encoder with its vocabulary; the old file stays until the new one is whole."""
    config = {"vocabulary": list(model.config.vocabulary)}
    info = metadata.build("text_encoder", config, title=title, author=author, licence=licence)
    files.save(path, model.state_dict(), info)


def load_text_encoder(path: PathLike) -> TextEncoder:
    """Read the tiny model's text encoder; raises as :func:`load_autoencoder` does."""
    meta, info, name = _header(path, "text_encoder")
    words = metadata.parse(info, "text_encoder", name).get("vocabulary")
    with files.naming(name):
        rows, context = dims(meta, "token_embedding.weight", 2)
        length, _ = dims(meta, "position_embedding", 2)
        pooled, _ = dims(meta, "pool.weight", 2)
    if not isinstance(words, list) or len(words) + 2 != rows or not all(isinstance(word, str) for word in words):
        raise CheckpointError(
            f"{name}: its vocabulary is not {rows - 2} words, one for each embedding; the file is damaged"
        )
    with torch.device("meta"):
        model = TextEncoder(TextEncoderConfig(tuple(words), length, context, pooled))
    layout.check(meta, model, name)
    model.load_state_dict(_tensors(path, info), assign=True)
    return model.eval()


def _header(path: PathLike, kind: FileKind) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """Tensors on the meta device, metadata and name of a file that must be of ``kind``; no tensor is read."""
    name = Path(path).name
    with files.Reader(path) as file:
        info = dict(file.header.metadata)
        found = detect(file.header.shapes, metadata.kind_of(info))
        if found.kind != kind:
            raise CheckpointError(
                f"{name} is {found.description}; {_WHERE[kind]}{_OTHERWISE.get((found.kind, kind), '')}"
            )
        return file.header.meta(name), info, name


def _tensors(path: PathLike, info: Mapping[str, str], check: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """The tensors, all of them finite (or those named in ``check``, of files too large to look at every number)."""
    state, found = files.read(path)
    name = Path(path).name
    if found != info:
        raise CheckpointError(f"{name} was changed while it was read; load it again")
    files.check_finite({key: state[key] for key in check if key in state} if check else state, name)
    files.check_hash(path, info)
    return state


def _strip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the prefix that whole checkpoints put before the diffusion model's names."""
    for prefix in CHECKPOINT_PREFIXES:
        inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if inner:
            return inner
    return dict(state)


def _agree(found: LatentSpec, claimed: LatentSpec, attributes: Sequence[str]) -> None:
    """The shapes and the metadata must say the same."""
    for attribute in attributes:
        shape, meta = getattr(found, attribute), getattr(claimed, attribute)
        if shape != meta:
            raise CheckpointError(
                f"its weights have {attribute} = {shape}, its metadata says {meta}; the file is damaged"
            )
