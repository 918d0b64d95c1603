"""Each side of a comparison: how its model is built, and the call that is timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from davae_core.errors import DAVAEError

from . import core, cost, loading, others, pictures, route, whole
from .cost import Cost
from .setup import Setup

CORE, COMFY = "davae_core", "ComfyUI"
ALONE = loading.SIDES | whole.SIDES  # what needs files and a process of its own


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        what: a key of :data:`BUILDERS` or :data:`ALONE`.
        size: of the picture, in pixels a side.
        route: :data:`CORE` or :data:`COMFY`; what other packages do has their name.
        batch: pictures at a time.
    """

    what: str
    size: int = 0
    route: str = CORE
    batch: int = 1

    @property
    def label(self) -> str:
        """In words."""
        size = f", {self.size} px" if self.size else ""
        return f"{self.what}{size}{f', batch {self.batch}' if self.batch > 1 else ''} ({self.route})"


@dataclass(frozen=True)
class Built:
    """A side that is ready.

    Attributes:
        call: what is timed.
        notes: figures that are known without timing, after the call has been made.
    """

    call: Callable[[], Any]
    notes: dict[str, Any] = field(default_factory=dict)


def build(side: Side, setup: Setup, files: Path | None = None) -> Built:
    """Make a side's models and inputs.

    Args:
        side: which.
        setup: where and how large.
        files: the folder of the files that the case has written, for sides that load them.

    Raises:
        DAVAEError: there is no such side.
    """
    setup = replace(setup, batch=side.batch)
    if side.route == COMFY:
        route.booted(setup.device)
    if side.what in BUILDERS:
        return Built(BUILDERS[side.what](side, setup))
    if side.what in ALONE and files is not None:
        return Built(*ALONE[side.what](setup, files))
    raise DAVAEError(f"no side {side.what!r}; there are {', '.join([*BUILDERS, *ALONE])}")


def forget() -> None:
    """Let go of all models, so that the next comparison has the memory."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.unload_all_models()
    for module in (core, route, others):
        for name, function in vars(module).items():
            if hasattr(function, "cache_clear") and name != "booted":
                function.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _model(is_adapted: bool, guided: bool = True) -> Callable[[Side, Setup], Callable[[], Any]]:
    def make(side: Side, setup: Setup) -> Callable[[], Any]:
        models = route if side.route == COMFY else core
        alone = replace(setup, batch=1)  # one model for all batches
        model = (models.adapted if is_adapted else models.native)(alone)
        return models.model_call(model, setup, is_adapted, side.size, guided)

    return make


def _tiny_decode(side: Side, setup: Setup) -> Callable[[], Any]:
    z, model = core.noise(setup, *core.latent_shape(setup, True, side.size)), core.tiny_decoder(setup)
    return lambda: model(z)


def _decode(side: Side, setup: Setup) -> Callable[[], Any]:
    is_davae = side.what != "SD3 VAE decode"
    z = core.noise(setup, *core.latent_shape(setup, is_davae, side.size))
    if side.route == COMFY:
        z = z.float().cpu()
        if not is_davae:
            vae = route.sd3_vae(setup)
            return lambda: vae.decode(z)
        if side.what == "DA-VAE decode":
            handle = route.davae(setup)
            return lambda: handle.decode(z)
        stock = route.davae(setup).stock_vae()
        return lambda: stock.decode_tiled(z)
    if not is_davae:
        autoencoder = core.sd3_vae(setup)  # made here: the call alone is measured
        return lambda: autoencoder.decode(z)
    model = core.davae(setup)
    return (lambda: model.decode_tiled(z)) if "tiled" in side.what else (lambda: model.decode(z))


def _encode(side: Side, setup: Setup) -> Callable[[], Any]:
    x = core.noise(setup, setup.batch, 3, side.size, side.size).clamp(-1, 1)
    is_davae = side.what != "SD3 VAE encode"
    if side.route == COMFY:
        image = ((x.float().cpu() + 1) / 2).movedim(1, -1).contiguous()
        if not is_davae:
            vae = route.sd3_vae(setup)
            return lambda: vae.encode(image)
        handle = route.davae(setup)
        return lambda: handle.encode(image)
    if not is_davae:
        autoencoder = core.sd3_vae(setup)
        return lambda: autoencoder.encode(x)
    model = core.davae(setup)
    return (lambda: model.encode_tiled(x)) if "tiled" in side.what else (lambda: model.encode(x))


BUILDERS: dict[str, Callable[[Side, Setup], Callable[[], Any]]] = {
    "native": _model(False),
    "adapted": _model(True),
    "adapted, no guidance": _model(True, guided=False),
    "tiny decode": _tiny_decode,
    "diffusers": lambda side, setup: others.transformer_call(setup, side.size),
    "SD3 VAE decode": _decode,
    "DA-VAE decode": _decode,
    "DA-VAE tiled decode": _decode,
    "DC-AE f32 decode": lambda side, setup: others.dc_ae_decode(setup, side.size),
    "SD3 VAE encode": _encode,
    "DA-VAE encode": _encode,
    "DA-VAE tiled encode": _encode,
    "picture, native": lambda side, setup: pictures.native(setup, side.size, side.route == COMFY),
    "picture, adapted": lambda side, setup: pictures.adapted(setup, side.size, side.route == COMFY),
    "picture, native at half size, bicubic": lambda side, setup: pictures.half(setup, side.size, side.route == COMFY),
}


def count(side: Side, setup: Setup) -> Cost | None:
    """Operations and bytes of one call of a side; None where they say nothing."""
    return _count(side.what, side.size, replace(setup, batch=side.batch))


@cache
def _count(what: str, size: int, setup: Setup) -> Cost | None:
    def network(is_adapted: bool, size: int, texts: int = 2) -> Cost:
        config = core.adapted_config(setup) if is_adapted else setup.mmdit()
        _, _, height, width = core.latent_shape(setup, is_adapted, size)
        return cost.model_call(config, height, width, texts * setup.batch, setup.torch_dtype)

    def vae(what: str, is_davae: bool, size: int) -> Cost:
        return cost.autoencoder(what, is_davae, size, setup.batch, setup.torch_dtype)

    known: dict[str, Callable[[], Cost]] = {
        "native": lambda: network(False, size),
        "diffusers": lambda: network(False, size),
        "adapted": lambda: network(True, size),
        "adapted, no guidance": lambda: network(True, size, texts=1),
        "SD3 VAE decode": lambda: vae("decode", False, size),
        "DA-VAE decode": lambda: vae("decode", True, size),
        "DA-VAE tiled decode": lambda: vae("decode", True, size),
        "DC-AE f32 decode": lambda: others.dc_ae_cost(setup, size),
        "SD3 VAE encode": lambda: vae("encode", False, size),
        "DA-VAE encode": lambda: vae("encode", True, size),
        "DA-VAE tiled encode": lambda: vae("encode", True, size),
        "picture, native": lambda: network(False, size) * setup.steps + vae("decode", False, size),
        "picture, adapted": lambda: network(True, size) * setup.steps + vae("decode", True, size),
        "picture, native at half size, bicubic": lambda: (
            network(False, size // 2) * setup.steps + vae("decode", False, size // 2)
        ),
    }
    return known[what]() if what in known else None
