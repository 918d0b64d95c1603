"""The diffusion model of the authors' SD3 release, read into an adapter.

Source: github.com/caixin98/DA-VAE, ``sd3/omini/pipeline/sd3_transformer_wrapper_tokenizer.py`` (with
``augment_mode: branch`` and ``reverse: true``) and ``sd3/omini/train_sd3_davae/tokenizer_trainer.py``. A ``latest.pt``
holds, under ``model_state_dict``:

    tokenizer_patch_embed.proj.base_conv.*, extra_conv.*   P as trained on, and P'; their outputs are added
    tokenizer_patch_embed.pos_embed                        the pretrained model's positions
    project_out.base_linear.*, extra_linear.*              O as trained on, and O'; joined per patch position

and often ``ema_state_dict``, the running average of everything trained, LoRA included, by the names of the training's
modules. Channels are [detail, base]. The LoRA lies in a folder of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..adapter import EMBED, HEAD, PREFIX, WIDENED, Adapter, AdapterConfig, Recommended, widen
from ..errors import CheckpointError, DAVAEError
from ..latent import LatentSpec
from ..lora import lora_deltas
from . import files, layout, lora, pickled, reference, verify
from .authors_autoencoder import read_statistics
from .tensors import Tensors, in_memory

_EMBED = re.compile(r"(?:.*\.)?(?:tokenizer_patch_embed|pos_embed)\.proj\.(base|extra)_conv\.(weight|bias)")
_HEAD = re.compile(r"(?:.*\.)?(?:project_out|proj_out)\.(base|extra)_linear\.(weight|bias)")
_OF_LORA = re.compile(r"\.(lora_[AB]\.weight|alpha)$")
_POSITIONS = re.compile(r"(?:.*\.)?(?:tokenizer_patch_embed|pos_embed)\.pos_embed")
_BRANCHES = tuple(
    f"{place}.{which}.{part}"
    for place in ("embed", "head")
    for which in ("base", "extra")
    for part in ("weight", "bias")
)


@dataclass(frozen=True)
class Trained:
    """What a training of the release left.

    Attributes:
        branches: ``embed|head . base|extra . weight|bias``.
        positions: the position grid, where it is stored.
        lora: LoRA of the running average, still in its own names; None where there is none.
        average: these are the running average (EMA), not the last step.
    """

    branches: Mapping[str, torch.Tensor]
    positions: torch.Tensor | None
    lora: Tensors | None
    average: bool


def read(content: Mapping[str, Any], file: str, average: bool | None = None) -> Trained:
    """Find embedder and head in the content of a ``latest.pt``.

    Args:
        content: what the file holds.
        file: its name, for messages.
        average: take the running average; None for where there is one.

    Raises:
        CheckpointError: they are not there, or the average is asked for and is not there.
    """
    model = content.get("model_state_dict", content)
    ema = content.get("ema_state_dict")
    if not isinstance(model, dict):
        raise CheckpointError(f"{file}: model_state_dict is no state dict, expected tensors by name")
    pickled.check(model, file)
    if average and not isinstance(ema, dict):
        raise CheckpointError(f"{file} holds no running average (ema_state_dict); take --weights last")
    pickled.check(ema if isinstance(ema, dict) else {}, file)
    running: dict[str, Any] = ema if isinstance(ema, dict) and average is not False else {}
    branches = _branches(model) | _branches(running)
    lacking = [name for name in _BRANCHES if name not in branches]
    if lacking:
        wide = "tokenizer_patch_embed.proj.weight" in model
        why = "it was trained with one wide embedder instead of two branches" if wide else "it is damaged"
        raise CheckpointError(
            f"{file} lacks {lacking[0]} of the embedder's and the head's two branches (tokenizer_patch_embed.proj."
            f"base_conv, extra_conv; project_out.base_linear, extra_linear): {why}"
        )
    positions = next((tensor for name, tensor in model.items() if _POSITIONS.fullmatch(name)), None)
    averaged = {name: tensor for name, tensor in running.items() if ".lora_" in name}
    return Trained(branches, positions, in_memory(averaged) if averaged else None, bool(running))


def _branches(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        for place, pattern in (("embed", _EMBED), ("head", _HEAD)):
            if match := pattern.fullmatch(name):
                found[f"{place}.{match[1]}.{match[2]}"] = tensor
    return found


def find_lora(checkpoint: Path, step: int | None) -> Path:
    """The LoRA folder that belongs to a ``latest.pt``: beside it, or in ``lora_weights`` beside its folder.

    Raises:
        CheckpointError: there is none.
    """
    places = [checkpoint.parent / "lora_weights", checkpoint.parent.parent / "lora_weights"]
    steps = [place / f"lora_step_{step}" for place in places] if step is not None else []
    here = [checkpoint.parent] if any((checkpoint.parent / name).is_file() for name in lora.WEIGHTS) else []
    for folder in [*steps, *(place / "latest" for place in places), *here]:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"no LoRA lies beside {checkpoint.name} (looked for {places[0].name}/lora_step_{step} and {lora.WEIGHTS[0]}); "
        "name its folder with --lora, or say --lora none if it was trained without"
    )


def convert(
    trained: Trained,
    lora_state: Mapping[str, torch.Tensor],
    base: Tensors,
    statistics: Path,
    file: str,
    recommended: Recommended = Recommended(),
) -> tuple[Adapter, float]:
    """The adapter, and how far its embedder, head and LoRA are from the source's.

    Args:
        trained: embedder and head.
        lora_state: as :func:`davae_core.checkpoints.lora.read` returns it; empty for none.
        base: the pretrained model, native names, from which the changes of P and O are told.
        statistics: the autoencoder's ``latent_norm_stats.json``.
        file: the source's name, for messages.
        recommended: sampling settings to note in the adapter.

    Raises:
        CheckpointError: shapes do not fit the base model, values are NaN, or the results differ.
    """
    layout.check_floats(trained.branches, file)
    layout.diffusion_model(base.meta, "the base model (--base)")
    parts = {name: tensor.float() for name, tensor in trained.branches.items()}
    files.check_finite({**parts, **lora_state}, file)
    pretrained = {name: base[name].float() for name in WIDENED}
    latent, patch = _check_shapes(parts, pretrained, file)
    mean, std = read_statistics(statistics, latent.detail_channels)
    _check_positions(trained.positions, base, file)
    state = {
        f"{PREFIX}{EMBED}detail.weight": parts["embed.extra.weight"],
        f"{PREFIX}{EMBED}delta.weight": parts["embed.base.weight"] - pretrained[f"{EMBED}weight"],
        f"{PREFIX}{EMBED}delta.bias": parts["embed.base.bias"] + parts["embed.extra.bias"] - pretrained[f"{EMBED}bias"],
        f"{PREFIX}{HEAD}detail.weight": parts["head.extra.weight"],
        f"{PREFIX}{HEAD}detail.bias": parts["head.extra.bias"],
        f"{PREFIX}{HEAD}delta.weight": parts["head.base.weight"] - pretrained[f"{HEAD}weight"],
        f"{PREFIX}{HEAD}delta.bias": parts["head.base.bias"] - pretrained[f"{HEAD}bias"],
        **lora_state,
    }
    latent = replace(latent, detail_mean=mean, detail_std=std)
    config = AdapterConfig(latent, pretrained[WIDENED[0]].shape[0], patch, recommended)
    try:
        AdapterConfig.from_state_dict(state, latent.base_channels)
    except CheckpointError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem
    adapter = Adapter(config, state)
    return adapter, _compare(adapter, parts, pretrained, base, file)


def _check_shapes(
    parts: Mapping[str, torch.Tensor], pretrained: Mapping[str, torch.Tensor], file: str
) -> tuple[LatentSpec, int]:
    hidden, channels, patch, _ = pretrained[f"{EMBED}weight"].shape
    detail = parts["embed.extra.weight"].shape[1] if parts["embed.extra.weight"].ndim == 4 else 0
    wanted = {
        "embed.base.weight": (hidden, channels, patch, patch),
        "embed.base.bias": (hidden,),
        "embed.extra.weight": (hidden, detail, patch, patch),
        "embed.extra.bias": (hidden,),
        "head.base.weight": (patch**2 * channels, hidden),
        "head.base.bias": (patch**2 * channels,),
        "head.extra.weight": (patch**2 * detail, hidden),
        "head.extra.bias": (patch**2 * detail,),
    }
    for name, shape in wanted.items():
        if tuple(parts[name].shape) != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(parts[name].shape)}, expected {list(shape)} for this base model; give "
                "the base model that it was trained from with --base"
            )
    try:  # the release's D is C (s - 1)
        return LatentSpec(channels, detail, detail // channels + 1), patch
    except DAVAEError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def _check_positions(positions: torch.Tensor | None, base: Tensors, file: str) -> None:
    """An adapter holds no positions, so the base model's must be the ones it was trained with."""
    if positions is None:
        return
    ours = base["pos_embed"]
    same = positions.shape == ours.shape and all(
        torch.allclose(theirs.float(), mine.float(), atol=1e-2, rtol=1e-2)  # one of them may be rounded to bfloat16
        for theirs, mine in zip(positions[0].split(4096), ours[0].split(4096), strict=True)
    )
    if not same:
        raise CheckpointError(
            f"{file} was trained with other positions ({list(positions.shape)}) than the base model has "
            f"({list(ours.shape)}); give the base model that it was trained from with --base"
        )


@torch.no_grad()
def _compare(
    adapter: Adapter,
    parts: Mapping[str, torch.Tensor],
    pretrained: Mapping[str, torch.Tensor],
    base: Tensors,
    file: str,
) -> float:
    """The release's two branches against the one wide layer, and each LoRA's two factors against its product."""
    latent, patch, wide = adapter.config.latent, adapter.config.patch, widen(pretrained, adapter)
    draw = torch.Generator().manual_seed(0)
    x_base = torch.randn(1, latent.base_channels, 2 * patch, 3 * patch, generator=draw)
    x_detail = torch.randn(1, latent.detail_channels, 2 * patch, 3 * patch, generator=draw)
    tokens = torch.randn(1, 6, adapter.config.hidden, generator=draw)
    theirs = F.conv2d(x_base, parts["embed.base.weight"], parts["embed.base.bias"], stride=patch)
    theirs = theirs + F.conv2d(x_detail, parts["embed.extra.weight"], parts["embed.extra.bias"], stride=patch)
    ours = F.conv2d(torch.cat([x_base, x_detail], 1), wide[f"{EMBED}weight"], wide[f"{EMBED}bias"], stride=patch)
    worst = verify.same(f"the embedder of {file}", ours, theirs)

    pair = [
        reference.image_of(tokens @ parts[f"head.{which}.weight"].T + parts[f"head.{which}.bias"], 2, 3, patch)
        for which in ("base", "extra")
    ]
    ours = reference.image_of(F.linear(tokens, wide[f"{HEAD}weight"], wide[f"{HEAD}bias"]), 2, 3, patch)
    worst = max(worst, verify.same(f"the head of {file}", ours, torch.cat(pair, dim=1)))

    stems = list(dict.fromkeys(_OF_LORA.sub("", name) for name in adapter.lora_state()))
    for stem, (weight, third, delta) in zip(stems, lora_deltas(adapter.state), strict=True):
        rows = base.meta[weight].shape if weight in base else (0, 0)
        if (rows[0] // (1 if third is None else 3), rows[1]) != tuple(delta.shape):
            raise CheckpointError(
                f"{file}: {stem} of the LoRA changes {list(delta.shape)} values, but {weight} of the base model is "
                f"{list(rows)}; give the base model that it was trained from with --base"
            )
        down, up = (adapter.state[f"{stem}.lora_{factor}.weight"].float() for factor in "AB")
        x = torch.randn(2, down.shape[1], generator=draw)
        scaled = (x @ down.T @ up.T) * (float(adapter.state[f"{stem}.alpha"]) / down.shape[0])
        worst = max(worst, verify.same(f"the LoRA {stem}", x @ delta.T, scaled))
    return worst
