"""The autoencoder of the authors' SD3 release, read into a DA-VAE.

Source: github.com/caixin98/DA-VAE, ``sd3/modeling/modules/sd3_da_vae.py`` in mode "diff". Names:

    vae.*                      AutoencoderKL in diffusers' names: detail trunk and joint decoder; encoder.conv_out and
                               decoder.conv_in are not used
    dc_down.*, dc_up.*         down and up block
    original_vae_model.vae.*   the SD3 VAE as it was, which makes the base latent

The latent's channels are [detail, base] there. The up block's shortcut gives each latent channel a run of the decoder's
features, so that another order of channels is another order of features, and of everything in the decoder that reads
them. Groups of the decoder's norms hold features of one channel only, so the order can be changed without a trace.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ..autoencoder import NORM_GROUPS, Autoencoder
from ..davae import DAVAE, DAVAEConfig
from ..errors import CheckpointError, DAVAEError
from ..latent import LatentSpec
from . import files, foreign_json, layout, reference, settings, verify
from .diffusers_names import vae_config, vae_rules
from .names import to_native
from .tensors import Tensors

STATISTICS = "latent_norm_stats.json"
_UNUSED = ("encoder_alignment_proj.",)  # a training aid of a variant of the alignment loss


def read_statistics(path: Path, channels: int | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the detail channels, from the authors' JSON file.

    Raises:
        CheckpointError: the file is not there, or does not hold ``channels`` finite numbers each, deviations above 0.
    """
    try:
        told = foreign_json.read(path)
        mean, std = (settings.finite_numbers(told.get(name), name) for name in ("mean", "std"))
    except CheckpointError as problem:
        raise CheckpointError(
            f"{path.name} is no statistics file: {problem}. Expected JSON with two lists of numbers, mean and std, one "
            "number for each detail channel"
        ) from problem
    count = len(mean) if channels is None else channels
    if len(mean) != count or len(std) != count:
        raise CheckpointError(
            f"{path.name} holds {len(mean)} means and {len(std)} deviations, expected {count} of each: one for each "
            "detail channel"
        )
    if not all(value > 0 for value in std):
        raise CheckpointError(f"{path.name}: deviations must be above 0")
    return mean, std


def convert(source: Tensors, statistics: Path, file: str, base: Tensors | None = None) -> tuple[DAVAE, float]:
    """The DA-VAE, and how far its images and latents are from the source's.

    Args:
        source: the tensors of the release.
        statistics: its ``latent_norm_stats.json``.
        file: the source's name, for messages.
        base: an SD3 VAE in diffusers' names, where the source does not hold one.

    Raises:
        CheckpointError: tensors are missing or misshapen, hold NaN, or the results differ.
    """
    files.check_finite(source, file)
    source = source.renamed({name: name for name in source if not name.startswith(_UNUSED)})
    trained, original = source.below("vae."), source.below("original_vae_model.vae.") or base
    if original is None:
        raise CheckpointError(
            f"{file} does not hold the SD3 VAE (original_vae_model.*), which makes the base latent; name its file with "
            "--base"
        )
    rest = [name for name in source if not name.startswith(("vae.", "original_vae_model.vae.", "dc_down.", "dc_up."))]
    if rest:
        raise CheckpointError(f"{file} holds {rest[0]}, which the release's autoencoder does not have")
    config = vae_config(original)
    if vae_config(trained) != config:
        raise CheckpointError(f"{file}: its two VAEs differ in shape, {vae_config(trained)} and {config}")
    latent = _latent(source, config.latent_channels, config.feature_channels, config.factor, file)
    mean, std = read_statistics(statistics, latent.detail_channels)
    latent = replace(latent, detail_mean=mean, detail_std=std)

    rules = vae_rules(config)
    ours, own = to_native(original, rules, file), to_native(trained, rules, file)
    with torch.device("meta"):
        plain = Autoencoder(config)
    for tensors in (ours, own):
        layout.check(tensors.meta, plain, file)
    state = {name.replace("encoder.", "base_encoder.", 1): ours[name] for name in ours if name.startswith("encoder.")}
    state |= {name.replace("decoder.", "base_decoder.", 1): ours[name] for name in ours if name.startswith("decoder.")}
    trunk = [name for name in own if name.startswith("encoder.") and not name.startswith("encoder.conv_out.")]
    shared = all(torch.equal(own[name], ours[name]) for name in trunk)
    if not shared:
        state |= {name.replace("encoder.", "detail_trunk.", 1): own[name] for name in trunk}
    decoder = {
        name: own[name] for name in own if name.startswith("decoder.") and not name.startswith("decoder.conv_in")
    }
    up = {f"joint_up.conv.{part}": tensor for part, tensor in source.below("dc_up.conv.").items()}
    state |= _base_first(decoder | up, latent, len(config.widths) - 1, file)
    down = source.below("dc_down.")
    state |= {f"detail_down.{name.replace('shortcut_proj', 'shortcut')}": down[name] for name in down}
    with torch.device("meta"):
        model = DAVAE(DAVAEConfig(config, latent, shared_trunk=shared, base_decoder=True))
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as problem:
        reason = " ".join(line.strip() for line in str(problem).splitlines()[1:3])
        raise CheckpointError(f"{file} does not hold the tensors of the release's autoencoder: {reason}") from problem
    return model.eval(), _compare(model, source, original, file)


def _latent(source: Tensors, base: int, width: int, factor: int, file: str) -> LatentSpec:
    """What the shapes of the down and up block tell."""
    try:
        rows, channels, *_ = source.meta["dc_up.conv.weight"].shape
        down = source.meta["dc_down.conv.weight"].shape[0]
        biases = [source.meta[f"dc_{name}.conv.bias"].shape[0] for name in ("up", "down")]
    except (KeyError, ValueError) as problem:
        raise CheckpointError(f"{file}: {problem} is not there or misshapen") from problem
    scale, detail = math.isqrt(rows // width), channels - base
    if rows != width * scale**2 or 2 * detail != down * scale**2 or biases != [rows, down]:
        raise CheckpointError(
            f"{file}: dc_up has {channels} channels in and {rows} out, dc_down {down} out, which does not fit a base "
            f"VAE of {base} channels and {width} features. Only the release's mode 'diff' is known, where the latent "
            "is [detail, base]"
        )
    try:
        return LatentSpec(base, detail, scale, factor)
    except DAVAEError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def _base_first(state: dict[str, torch.Tensor], latent: LatentSpec, level: int, file: str) -> dict[str, torch.Tensor]:
    """Up block and decoder for channels [base, detail] instead of [detail, base]."""
    weight = state["joint_up.conv.weight"]
    features, squared = weight.shape[0] // latent.scale**2, latent.scale**2
    run, left = divmod(features, latent.channels)  # features that show one latent channel
    if left or (run * latent.base_channels) % (features // NORM_GROUPS):
        raise CheckpointError(
            f"{file}: {features} features for {latent.channels} channels do not fall into whole norm groups, so the "
            "order of channels cannot be changed"
        )
    first = run * latent.detail_channels
    order = torch.cat([torch.arange(first, features), torch.arange(first)])
    channels = torch.cat([torch.arange(latent.detail_channels, latent.channels), torch.arange(latent.detail_channels)])
    new = dict(state)
    new["joint_up.conv.weight"] = weight.unflatten(0, (features, squared))[order][:, :, channels].flatten(0, 1)
    new["joint_up.conv.bias"] = state["joint_up.conv.bias"].unflatten(0, (features, squared))[order].flatten()

    def reads(name: str) -> None:
        new[f"{name}.weight"] = state[f"{name}.weight"][:, order]

    def keeps(name: str) -> None:
        for part in ("weight", "bias"):
            new[f"{name}.{part}"] = state[f"{name}.{part}"][order]

    blocks = ["decoder.mid.block_1", "decoder.mid.block_2"]
    blocks += [
        name.removesuffix(".norm1.weight")
        for name in state
        if name.startswith(f"decoder.up.{level}.block.") and name.endswith(".norm1.weight")
    ]
    for block in blocks:
        keeps(f"{block}.norm1")
        reads(f"{block}.conv1")
        keeps(f"{block}.conv2")
    keeps("decoder.mid.attn_1.norm")
    for part in "qkv":
        reads(f"decoder.mid.attn_1.{part}")
    keeps("decoder.mid.attn_1.proj_out")
    if level:
        reads(f"decoder.up.{level}.upsample.conv")
    else:
        keeps("decoder.norm_out")
        reads("decoder.conv_out")
    return new


# The release's forward pass, for the comparison


def _encoded(source: Tensors, original: Tensors, x: torch.Tensor, latent: LatentSpec) -> torch.Tensor:
    """``[B, 3, H, W]`` in [0, 1] to [detail, base] as the release's decoder reads it, detail not normalised."""
    h = reference.encoder_features(source.below("vae."), 2 * x - 1)
    moments = F.pixel_unshuffle(
        F.conv2d(h, source["dc_down.conv.weight"].float(), source["dc_down.conv.bias"].float(), padding=1), latent.scale
    )
    shortcut = F.pixel_unshuffle(h, latent.scale)
    if "dc_down.shortcut_proj.weight" in source:
        moments = moments + F.conv2d(shortcut, source["dc_down.shortcut_proj.weight"].float())
    else:
        moments = moments + torch.stack([part.mean(1) for part in shortcut.chunk(moments.shape[1], dim=1)], dim=1)
    small = F.interpolate(x, [side // latent.scale for side in x.shape[-2:]], mode="bicubic", align_corners=False)
    base = reference.encode(original, 2 * small.clamp(0, 1) - 1)
    return torch.cat([moments.chunk(2, dim=1)[0], latent.normalise_base(base)], dim=1)


def _decoded(source: Tensors, z: torch.Tensor, scale: int) -> torch.Tensor:
    """[detail, base] to an image ``[B, 3, H, W]``, about [-1, 1] (the release maps that to [0, 1] and clamps)."""
    h = F.conv2d(z, source["dc_up.conv.weight"].float(), source["dc_up.conv.bias"].float(), padding=1)
    h = h + torch.cat([z[:, i : i + 1].expand(-1, h.shape[1] // z.shape[1], -1, -1) for i in range(z.shape[1])], dim=1)
    return reference.decode_features(source.below("vae."), F.pixel_shuffle(h, scale))


@torch.no_grad()
def _compare(model: DAVAE, source: Tensors, original: Tensors, file: str) -> float:
    latent = model.latent
    with torch.device("meta"):
        copy = DAVAE(model.config)
    copy.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()}, assign=True)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(1, model.config.base.image_channels, 2 * latent.factor, 2 * latent.factor, generator=draw)
    theirs = _encoded(source, original, x, latent)
    z = copy.encode(2 * x - 1)
    base, detail = latent.split(z)
    ordered = torch.cat([detail, latent.normalise_base(base)], dim=1)
    drawn = torch.randn(z.shape, generator=draw)
    base, detail = latent.split(latent.denormalise(drawn))
    shown = _decoded(source, torch.cat([detail, drawn[:, : latent.base_channels]], dim=1), latent.scale)
    return max(
        verify.same(f"the latent of {file}", ordered, theirs),
        verify.same(f"the image of {file}", copy.decode(latent.denormalise(drawn)), shown),
    )
