"""What is compared with what. A case's figure is its first side over its second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import loading, others, whole
from .setup import Setup
from .sides import COMFY, CORE, Side

SIZES = (256, 512, 1024, 1536, 2048, 4096)
BATCHES = (1, 2, 4)
ROUTES = (COMFY, CORE)


@dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
        name: unique; results, bounds and the command line know it by this.
        title: in words.
        sides: two or more, taken in turn.
        rounds: how often each is timed, if there is time.
        memory: the peak of each is measured too.
        alone: each side is timed in processes of its own, where its peak is measured too.
        scale: overrides the setup's.
        blocks: likewise, if not 0; -1 for all blocks.
        slow: part of the long run alone.
        sums: what calls of the sides make together, by its name: how often each, by the side's place.
        write_files: makes the files that sides of their own processes load.
    """

    name: str
    title: str
    sides: tuple[Side, ...]
    rounds: int = 7
    memory: bool = False
    alone: bool = False
    scale: str = ""
    blocks: int = 0
    slow: bool = False
    sums: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    write_files: Callable[[Path, Setup], None] | None = None


def quick() -> list[Case]:
    """Ratios that are stable on any machine, in about half a minute on two cores."""
    equal = [
        Case(
            f"equal tokens 256 {route}",
            "adapted / native model call, 256 tokens",
            (Side("adapted", 512, route), Side("native", 256, route)),
            rounds=9,
            scale="small",
            blocks=3,
        )
        for route in ROUTES
    ]
    decode = Case(
        "decode 128",
        "DA-VAE decode / SD3 VAE decode",
        (Side("DA-VAE decode", 128), Side("SD3 VAE decode", 128)),
        rounds=5,
    )
    load = Case(
        "adapter application",
        "adapter application / stock load",
        (Side("adapter application", route=COMFY), Side("stock load", route=COMFY)),
        rounds=1,
        memory=True,
        alone=True,
        scale="toy",
        blocks=-1,
        write_files=loading.write_files,
    )
    return [*equal, decode, load]


def everything(gpu: bool) -> list[Case]:
    """All cases; those that a machine has no time for are left out when they come up."""
    return [
        *_calls(),
        *_full_depth(gpu),
        *_autoencoder(),
        *_pictures(gpu),
        *_few_steps(),
        *_loading(gpu),
        *_whole(gpu),
        *_others(),
        *_batches(),
    ]


def _calls() -> Iterator[Case]:
    for route in ROUTES:
        for size in SIZES:
            yield Case(
                f"equal size {size} {route}",
                f"native / adapted model call at {size} px",
                (Side("native", size, route), Side("adapted", size, route)),
                rounds=5 if size <= 1024 else 3,
                memory=route == CORE,
            )
        for size in (1024, 2048):
            yield Case(
                f"equal tokens {size} {route}",
                f"adapted model call at {size} px / native at {size // 2} px",
                (Side("adapted", size, route), Side("native", size // 2, route)),
                rounds=9,
            )
    yield Case(
        f"equal tokens 4096 {CORE}",
        "adapted model call at 4096 px / native at 2048 px",
        (Side("adapted", 4096), Side("native", 2048)),
        rounds=1,
        memory=True,
    )
    yield Case(
        "route 1024",
        "ComfyUI route / bare davae_core, adapted model call at 1024 px",
        (Side("adapted", 1024, COMFY), Side("adapted", 1024, CORE)),
        rounds=9,
    )
    yield Case(
        "native route 512",
        "ComfyUI route / bare davae_core, native model call at 512 px: the same tokens, nothing of this pack",
        (Side("native", 512, COMFY), Side("native", 512, CORE)),
        rounds=9,
    )


def _full_depth(gpu: bool) -> Iterator[Case]:
    """On a GPU all cases are at full depth."""
    for size in () if gpu else (1024, 2048):
        yield Case(
            f"full depth {size}",
            f"native / adapted model call at {size} px, all 24 blocks",
            (Side("native", size), Side("adapted", size)),
            rounds=1,
            blocks=-1,
            slow=True,
        )


def _autoencoder() -> Iterator[Case]:
    for route in ROUTES:
        for what in ("decode", "encode"):
            yield Case(
                f"{what} 1024 {route}",
                f"DA-VAE {what} / SD3 VAE {what} at 1024 px",
                (Side(f"DA-VAE {what}", 1024, route), Side(f"SD3 VAE {what}", 1024, route)),
                rounds=5,
                memory=True,
            )
        yield Case(
            f"tiled decode 2048 {route}",
            "DA-VAE decode in strips / in one piece at 2048 px",
            (Side("DA-VAE tiled decode", 2048, route), Side("DA-VAE decode", 2048, route)),
            rounds=2,
            alone=True,
        )
    yield Case(
        "tiled encode 2048",
        "DA-VAE encode in strips / in one piece at 2048 px",
        (Side("DA-VAE tiled encode", 2048), Side("DA-VAE encode", 2048)),
        rounds=2,
        alone=True,
    )


def _pictures(gpu: bool) -> Iterator[Case]:
    sizes = (1024, 2048) if gpu else (512,)
    scale = "full" if gpu else "small"
    for route in ROUTES:
        for size in sizes:
            for batch in (1, 10) if gpu else (1,):
                yield Case(
                    f"picture {size} batch {batch} {route}",
                    f"30 steps and decode at {size} px, batch {batch}: native / adapted",
                    tuple(
                        Side(what, size, route, batch)
                        for what in ("picture, native", "picture, adapted", "picture, native at half size, bicubic")
                    ),
                    rounds=3,
                    memory=route == COMFY,
                    scale=scale,
                )


def _few_steps() -> Iterator[Case]:
    """A picture in many steps with guidance against one in few without it, summed up from its parts, all timed in one
    run: the native one is minutes a call on a CPU."""
    for route in ROUTES:
        for size in (1024, 2048):
            yield Case(
                f"four steps {size} {route}",
                f"native model call with guidance / adapted without, at {size} px",
                (
                    Side("native", size, route),
                    Side("adapted, no guidance", size, route),
                    Side("SD3 VAE decode", size, route),
                    Side("DA-VAE decode", size, route),
                    Side("tiny decode", size),
                ),
                rounds=3 if size <= 1024 else 1,
                sums={
                    "native, 30 steps with guidance, decode": {0: 30, 2: 1},
                    "adapted, 4 steps without, decode": {1: 4, 3: 1},
                    "adapted, 4 steps without, tiny decode": {1: 4, 4: 1},
                    "adapted, 30 steps with guidance (two texts a call), decode": {1: 60, 3: 1},
                },
            )


def _loading(gpu: bool) -> Iterator[Case]:
    scales = ("small", "full")
    for scale in scales:
        yield Case(
            f"adapter application {scale}",
            f"adapter application / stock load, {scale} size",
            (Side("adapter application", route=COMFY), Side("stock load", route=COMFY)),
            rounds=3,
            memory=True,
            alone=True,
            scale=scale,
            blocks=-1,
            slow=scale == "full" and not gpu,
            write_files=loading.write_files,
        )
    yield Case(
        "second run",
        "a graph's second run / its first, one step",
        (Side("graph, second run", route=COMFY), Side("graph, first run", route=COMFY)),
        rounds=3,
        alone=True,
        scale="small",
        blocks=-1,
        write_files=loading.write_files,
    )


def _whole(gpu: bool) -> Iterator[Case]:
    """With a checkpoint of about 5 GB, as it is published."""
    common: dict[str, Any] = {"rounds": 1, "memory": True, "alone": True, "blocks": -1, "slow": not gpu}
    yield Case(
        "whole file 1024",
        "load a whole checkpoint and draw one step at 1024 px: with an adapter / as it is",
        tuple(Side(f"whole file, {what}", route=COMFY) for what in ("base and adapter", "base", "merged")),
        write_files=whole.write_files,
        **common,
    )
    yield Case(
        "whole file commands",
        "merge a whole checkpoint with an adapter / inspect it",
        (Side("merge"), Side("inspect")),
        write_files=whole.write_files,
        **common,
    )


def _others() -> Iterator[Case]:
    if not others.available():
        return
    for size in (1024, 2048):
        yield Case(
            f"diffusers {size}",
            f"diffusers' SD3 transformer / adapted model call at {size} px",
            (Side("diffusers", size, "diffusers"), Side("adapted", size), Side("native", size)),
            rounds=3,
        )
    yield Case(
        "DC-AE decode 1024",
        "DC-AE f32 decode / DA-VAE decode at 1024 px",
        (Side("DC-AE f32 decode", 1024, "diffusers"), Side("DA-VAE decode", 1024)),
        rounds=3,
        memory=True,
    )


def _batches() -> Iterator[Case]:
    for batch in BATCHES:
        yield Case(
            f"batch {batch}",
            f"native / adapted model call at 512 px, batch {batch}",
            (Side("native", 512, batch=batch), Side("adapted", 512, batch=batch)),
            rounds=3,
            memory=True,
        )
