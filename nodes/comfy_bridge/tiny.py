"""The tiny SD3.5 and its text encoder as MODEL and CLIP."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd1_clip import token_weights
from comfy.supported_models_base import ClipTarget
from torch import nn

from ...davae_core import checkpoints, tiny
from ...davae_core.checkpoints import files, foreign_json, settings
from ...davae_core.errors import CheckpointError, DAVAEError
from ...davae_core.text_encoder import TextEncoder
from .folders import file_stamp
from .latent_format import colour_previews

_FILES = {"diffusion_models": tiny.MODEL, "text_encoders": tiny.TEXT_ENCODER}


def tiny_stamp() -> str:
    """For the node's ``fingerprint_inputs``: changes when one of the two files does."""
    return " ".join(file_stamp(kind, name) for kind, name in _FILES.items())


def load_tiny() -> tuple[ModelPatcher, comfy.sd.CLIP]:
    """MODEL and CLIP of the tiny model.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    model, text = (_find(kind, name) for kind, name in _FILES.items())
    _, metadata = files.read_metadata(model)  # also because ComfyUI does not say which file is damaged
    patcher = comfy.sd.load_diffusion_model(model)
    with files.naming(Path(model).name):
        told = foreign_json.value(metadata.get(tiny.PREVIEW, "[]"), tiny.PREVIEW)
        colours = settings.finite_numbers(told, tiny.PREVIEW)
    colour_previews(patcher.model.latent_format, colours)
    return patcher, _clip(checkpoints.load_text_encoder(text))


def _find(kind: str, name: str) -> str:
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise CheckpointError(
            f"the tiny model's file {name} is missing: it is neither in {tiny.FOLDERS[kind]} nor in models/{kind}. "
            "Install the pack again, or make the file anew as the README says"
        )
    return path


def _clip(encoder: TextEncoder) -> comfy.sd.CLIP:
    """A CLIP that stock nodes accept around the tiny text encoder, which works in fp32 whatever its file holds."""
    encoder = encoder.float()
    target = ClipTarget(lambda **_: _Tokenizer(encoder), lambda **_: _Conditioner(encoder))
    return comfy.sd.CLIP(target, model_options={"dtype": torch.float32})


class _Tokens(dict):
    """Tokens by encoder; asked for an encoder of the real SD3.5, it says what to do."""

    def __missing__(self, encoder: str) -> None:
        raise DAVAEError(
            f"the tiny model has one text encoder and no {encoder!r}; encode its prompts with the CLIP Text Encode node"
        )


class _Tokenizer:
    """Words to (token, weight), with ComfyUI's ``(word:1.2)`` notation."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, list]:
        pairs = [(token, weight) for part, weight in token_weights(text, 1.0) for token in self.encoder.tokenize(part)]
        padded = self.encoder.pad([token for token, _ in pairs])
        weights = ([weight for _, weight in pairs] + [1.0] * len(padded))[: len(padded)]
        numbers = [(i + 1,) if return_word_ids else () for i in range(len(padded))]
        return _Tokens(tiny=[[(token, weight, *n) for token, weight, n in zip(padded, weights, numbers, strict=True)]])

    def untokenize(self, pairs: list[tuple]) -> list[tuple]:
        words = ("<pad>", "<unknown>", *self.encoder.config.vocabulary)
        return [(pair, words[pair[0]]) for pair in pairs]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class _Conditioner(nn.Module):
    """Tokens to context and pooled vector, as ComfyUI's CLIP object asks for them."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Nothing can be chosen here: there are no layers to skip."""

    def reset_clip_options(self) -> None:
        """Nothing can be chosen here."""

    def load_sd(self, state: dict[str, torch.Tensor]) -> Any:
        return self.encoder.load_state_dict(state, strict=False)

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
        """The text tokens, each weighted word moved away from or towards an empty prompt, and the pooled vector."""
        device = self.encoder.position_embedding.device
        ids, weights = ([[pair[i] for pair in section] for section in tokens["tiny"]] for i in (0, 1))
        context, pooled = self.encoder(torch.tensor(ids, device=device))
        empty, _ = self.encoder(torch.zeros_like(torch.tensor(ids[:1], device=device)))
        context = empty + (context - empty) * torch.tensor(weights, device=device)[..., None]
        out = comfy.model_management.intermediate_device()
        return context.flatten(0, 1)[None].float().to(out), pooled[:1].float().to(out)
