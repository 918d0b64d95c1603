"""Say it in the log when files meet others than those they were trained with. Never an error: a finetune or a merge of
the right model works, and the log then says why a picture may look different.

A latent does not tell which DA-VAE it is of. What adapted models sampled last is known again by a few of its values,
with any sampler and through any node that leaves a latent as it is.
"""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...davae_core.adapter import Adapter
from ...davae_core.history import SAMPLES, History, mismatch

_RECENT = 32  # sampled latents that are remembered


@dataclass(frozen=True)
class _Sampled:
    shape: tuple[int, ...]
    values: tuple[float, ...]
    history: History


_sampled: deque[_Sampled] = deque(maxlen=_RECENT)
_said: set[str] = set()


def note_base(adapter: Adapter, name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Say it where an adapter is put on another model than it was trained on.

    Args:
        adapter, name: the adapter and its file.
        state: the MODEL's own weights, without LoRA, names of the SD3.5 layout.
    """
    if words := mismatch(adapter.history, "base_model", state):
        _say_once(f"DA-VAE: {name} was {words}: the MODEL. A finetune or merge of it may do, any other model not")


def note_predictor(history: History | None, name: str, davae: torch.nn.Module, davae_name: str) -> None:
    """Say it where a detail predictor meets another DA-VAE than the one it was trained with.

    Args:
        history, name: of the predictor and its file.
        davae, davae_name: the DA-VAE and its file.
    """
    if history is not None and "davae" in history.of and (words := mismatch(history, "davae", davae.state_dict())):
        _say_once(f"DA-VAE: {name} was {words}: {davae_name}. The detail that it predicts is not this DA-VAE's")


def note_adapted(history: History | None, name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Say it where a few-step LoRA is put on another adapted model than it was trained on.

    Args:
        history, name: of the LoRA and its file.
        state: the MODEL's own embedder and head, without LoRA, names of the SD3.5 layout.
    """
    if words := mismatch(history, "adapted_model", state):
        _say_once(
            f"DA-VAE: {name} was {words}: the MODEL. Use the adapter that it was trained on, at strength 1; with "
            "another, pictures in few steps may be wrong"
        )


def note_sampled(history: History | None, latent: torch.Tensor) -> None:
    """Remember which DA-VAE a latent is of, that an adapted model has just sampled: ``[B, C + D, h, w]``."""
    if history is not None and "davae" in history.of and latent.numel():
        _sampled.append(_Sampled(tuple(latent.shape[1:]), _values(latent), history))


def note_decoded(latent: torch.Tensor, model: torch.nn.Module, name: str) -> None:
    """Say it where a latent is decoded with another DA-VAE than that of the adapter that sampled it.

    Args:
        latent: ``[B, C + D, h, w]``.
        model, name: the DA-VAE and its file.
    """
    if not _sampled or not latent.numel():
        return
    values = _values(latent)
    for one in reversed(_sampled):
        if one.shape == tuple(latent.shape[1:]) and _alike(one.values, values):
            if words := mismatch(one.history, "davae", model.state_dict()):
                _say_once(
                    f"DA-VAE: the adapter that sampled this latent was {words}: {name}. Detail decodes wrongly with "
                    "another DA-VAE than the adapter's own"
                )
            return


def _values(latent: torch.Tensor) -> tuple[float, ...]:
    first = latent[0].detach().flatten()
    count = 4 * SAMPLES
    places = [(2 * i + 1) * first.numel() // (2 * count) for i in range(count)]
    return tuple(first[torch.tensor(places, device=first.device)].float().tolist())


def _alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(abs(a - b) <= 1e-2 + 1e-2 * abs(b) for a, b in zip(one, other, strict=True))


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logging.warning(message)
