"""A pretrained model with an adapter in it, of which only the adapter is trained."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ...adapter import EMBED, HEAD, PREFIX, WIDENED, Adapter, Recommended, widen, zero_adapter
from ...errors import DAVAEError
from ...latent import LatentSpec
from ...mmdit import MMDiT, MMDiTConfig
from . import lora
from .recompute import recompute

logger = logging.getLogger(__name__)


class AdaptedModel(nn.Module):
    """A pretrained MMDiT that reads and predicts C + D channels; only what the adapter holds is trained.

    Args:
        base: state dict of the pretrained model.
        latent: the latent to adapt to.
        rank, targets: of the LoRA.
        seed: draws the LoRA's first factors.
        start: what is learned already, at any rank; nothing where it is not given.
        frozen: dtype of the matrices that are not trained; the positions keep the file's unless it is float32.
        zero_init: start the detail's part of embedder and head at zero; otherwise drawn with the pretrained spread.

    Raises:
        DAVAEError: ``start`` is for another model, latent or LoRA.
    """

    def __init__(
        self,
        base: dict[str, torch.Tensor],
        latent: LatentSpec,
        rank: int,
        targets: tuple[str, ...],
        seed: int,
        start: Adapter | None = None,
        frozen: torch.dtype = torch.float32,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        config = MMDiTConfig.from_state_dict(base)
        generator = torch.Generator().manual_seed(seed)
        adapter = zero_adapter(config, latent, rank, targets, generator)
        if not zero_init:
            for name in (f"{EMBED}weight", f"{HEAD}weight"):
                drawn = adapter.state[f"{PREFIX}{name.removesuffix('weight')}detail.weight"]
                drawn.normal_(std=float(base[name].float().std()), generator=generator)
        self.adapter_config = adapter.config
        if start is not None:
            start = resized(start, adapter)
            check_continues(start, adapter)
            adapter = Adapter(adapter.config, {name: tensor.float() for name, tensor in start.state.items()})
        self.start = {name: base[name].float().clone() for name in WIDENED}
        with torch.device("meta"):
            self.mmdit = MMDiT(replace(config, in_channels=latent.channels, out_channels=latent.channels))
        # Copies: a tensor of the file is a view of it on the disk.
        state = {name: tensor.to(held_as(name, tensor, frozen), copy=True) for name, tensor in base.items()}
        self.mmdit.load_state_dict(state | widen(state, adapter), assign=True)
        self.mmdit.requires_grad_(False)
        for name in WIDENED:
            self.mmdit.get_parameter(name).requires_grad_(True)
        self.places = lora.attach(self.mmdit, adapter.lora_state())

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        present: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :class:`MMDiT`, with ``x [B, C + D, h, w]``."""
        return self.mmdit(x, t, context, pooled, present)

    def checkpoint_blocks(self) -> None:
        """Compute the blocks again in the backward pass instead of keeping what is inside them."""
        recompute(self.mmdit.joint_blocks)

    def adapter(self, recommended: Recommended) -> Adapter:
        """What was learned, as an adapter."""
        config = replace(self.adapter_config, recommended=recommended)
        now = {name: self.mmdit.get_parameter(name).detach().float() for name in WIDENED}
        start = {name: tensor.to(now[name]) for name, tensor in self.start.items()}
        channels, positions = config.latent.base_channels, config.patch**2
        embed = f"{EMBED}weight"
        state = {
            f"{PREFIX}{EMBED}detail.weight": now[embed][:, channels:],
            f"{PREFIX}{EMBED}delta.weight": now[embed][:, :channels] - start[embed],
            f"{PREFIX}{EMBED}delta.bias": now[f"{EMBED}bias"] - start[f"{EMBED}bias"],
        }
        for part in ("weight", "bias"):
            rows = now[f"{HEAD}{part}"].unflatten(0, (positions, -1))
            state[f"{PREFIX}{HEAD}detail.{part}"] = rows[:, channels:].flatten(0, 1)
            state[f"{PREFIX}{HEAD}delta.{part}"] = rows[:, :channels].flatten(0, 1) - start[f"{HEAD}{part}"]
        return Adapter(config, state | lora.tensors(self.places))


def frozen_model(state: Mapping[str, torch.Tensor], frozen: torch.dtype) -> MMDiT:
    """A diffusion model that is not trained, on tensors of its own; ``frozen`` is the dtype of its matrices."""
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig.from_state_dict(dict(state)))
    held = {name: tensor.to(held_as(name, tensor, frozen), copy=True) for name, tensor in state.items()}
    model.load_state_dict(held, assign=True)
    return model.requires_grad_(False)


def held_as(name: str, tensor: torch.Tensor, frozen: torch.dtype) -> torch.dtype:
    """How a tensor of the base model is held."""
    if frozen == torch.float32 or name in WIDENED or tensor.ndim < 2:
        return torch.float32
    return tensor.dtype if name == "pos_embed" else frozen


def resized(start: Adapter, fresh: Adapter) -> Adapter:
    """``start`` with the LoRA rank of ``fresh``.

    From a lower rank it is the same change of the model, with room to learn more: the factors of ``start`` first, then
    the first factors of ``fresh`` and zeros. From a higher one it is the nearest change of that rank in squared error,
    by singular values, which the two factors share.
    """
    state = dict(start.state)
    before = after = 0.0
    for name, tensor in start.state.items():
        stem, is_first, _ = name.partition(".lora_A.weight")
        wanted, up = fresh.state.get(name), start.state.get(f"{stem}.lora_B.weight")
        if not is_first or wanted is None or up is None or wanted.shape[0] == tensor.shape[0]:
            continue
        old, new = tensor.shape[0], wanted.shape[0]
        factor = float(start.state.get(f"{stem}.alpha", torch.tensor(float(old)))) / old
        down, up = tensor.float(), factor * up.float()
        if new < old:
            before += strength(down, up)
            down, up = reduced(down, up, new)
            after += strength(down, up)
        missing = new - len(down)
        down, up = torch.cat([down, wanted[new - missing :].float()]), torch.nn.functional.pad(up, (0, missing))
        state |= {name: down, f"{stem}.lora_B.weight": up, f"{stem}.alpha": torch.tensor(float(new))}
    if before:
        logger.info(
            "the adapter to start from has a higher LoRA rank: %.1f %% of its change is kept", 100 * after / before
        )
    return replace(start, state=state)


def strength(down: torch.Tensor, up: torch.Tensor) -> float:
    """The sum of the squares of ``up @ down``."""
    return float(((up.T @ up) * (down @ down.T)).sum())


def reduced(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors ``[rank, in]`` and ``[out, rank]`` of the product nearest to ``up @ down``; fewer if that has fewer."""
    (rows, of_down), (columns, of_up) = torch.linalg.qr(down.T), torch.linalg.qr(up)
    left, values, right = torch.linalg.svd(of_up @ of_down.T)
    root = values[:rank].sqrt()
    return root[:, None] * (right[: len(root)] @ rows.T), columns @ left[:, : len(root)] * root


def check_continues(start: Adapter, fresh: Adapter) -> None:
    """Raise DAVAEError unless ``start`` has the tensors of ``fresh``, for the same latent in the same units."""
    told, wanted = ({n: t.shape for n, t in a.state.items() if not n.endswith(".alpha")} for a in (start, fresh))
    optional = {name for name in wanted if ".delta." in name} - told.keys()
    odd = sorted(n for n in told.keys() | wanted.keys() if told.get(n) != wanted.get(n) and n not in optional)
    if odd:
        is_, expected = (list(shapes[odd[0]]) if odd[0] in shapes else "not there" for shapes in (told, wanted))
        raise DAVAEError(
            f"the adapter to start from (--start) is not of this recipe's shape: {odd[0]} is {is_}, expected {expected}"
            "; use its model, --rank and --targets"
        )
    here, there = (torch.tensor(units(a.config.latent)) for a in (start, fresh))
    if not torch.allclose(here, there, rtol=1e-4, atol=1e-5):
        raise DAVAEError(
            "the adapter to start from (--start) was trained on another DA-VAE: the statistics of its latent differ "
            "from those of --autoencoder; give the DA-VAE it was trained on"
        )


def units(latent: LatentSpec) -> tuple[float, ...]:
    """The numbers that take a latent from the model's units: the shift of each channel, then the factor of each."""
    shift, step = (latent.denormalise(torch.full((1, latent.channels, 1, 1), value)) for value in (0.0, 1.0))
    return *shift.flatten().tolist(), *(step - shift).flatten().tolist()
