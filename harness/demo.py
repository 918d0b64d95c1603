"""The demo: prompt to picture, the same with the unadapted model, and a picture there and back, in a real ComfyUI.

Run by ``dev.py demo``. Uses the tiny models that ship with the pack; where there are none, untrained ones.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

from davae_core import tiny

from .graph import Graph, Node
from .headless import HeadlessComfy
from .locate import REPOSITORY, find_comfyui
from .scratch import make_base
from .untrained import Family

UNTRAINED = """
THE MODELS OF THIS DEMO ARE UNTRAINED: random weights in the true layouts, made a moment ago.
The pictures are noise. They show that every node runs, not that the method works.
"""


def tiny_models_are_there() -> bool:
    """Whether the pack holds all files of the trained tiny family."""
    places = {"diffusion_models": tiny.MODEL, "text_encoders": tiny.TEXT_ENCODER}
    places |= {"vae": tiny.AUTOENCODER, "loras": tiny.ADAPTER}
    return all((tiny.FOLDERS[kind] / name).is_file() for kind, name in places.items())


def encode_prompts(g: Graph, clip: list, prompt: str) -> dict[str, Node]:
    """Positive and negative conditioning."""
    return {
        key: g.node("CLIPTextEncode", clip=clip, text=text) for key, text in (("positive", prompt), ("negative", ""))
    }


def with_davae(g: Graph, prompt: str, side: int) -> Node:
    """Prompt to picture with the adapted model."""
    model = g.node("DAVAE_TinySD35")
    davae = g.node("DAVAE_Loader", davae_name=tiny.AUTOENCODER, dtype="auto")
    adapted = g.node("DAVAE_Adapter", model=model, adapter_name=tiny.ADAPTER, strength=1.0)
    latent = g.node(
        "DAVAE_Sampler", model=adapted, adapter_name="(already adapted)", **encode_prompts(g, model[1], prompt), seed=1,
        steps=0, cfg=0.0, sampler_name="euler", scheduler="simple", shift=0.0, denoise=1.0, width=side, height=side,
    )  # fmt: skip
    return g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0)


def native(g: Graph, prompt: str, side: int) -> Node:
    """Prompt to picture with the unadapted model, at half the size and so with the same number of tokens."""
    model = g.node("DAVAE_TinySD35")
    davae = g.node("DAVAE_Loader", davae_name=tiny.AUTOENCODER, dtype="auto")
    latent = g.node(
        "KSampler", model=model, **encode_prompts(g, model[1], prompt), seed=1, steps=30, cfg=2.5, sampler_name="euler",
        scheduler="simple", denoise=1.0,
        latent_image=g.node("EmptySD3LatentImage", width=side // 2, height=side // 2, batch_size=1),
    )  # fmt: skip
    return g.node("VAEDecode", samples=latent, vae=davae[1])


def round_trip(g: Graph, image: str) -> Node:
    """Picture to latent and back."""
    davae = g.node("DAVAE_Loader", davae_name=tiny.AUTOENCODER, dtype="auto")
    latent = g.node("DAVAE_DetailEncode", image=g.node("LoadImage", image=image), davae=davae[2], size_rule="pad")
    return g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0)


def save(comfy: HeadlessComfy, name: str, out: Path, build) -> Path:
    """Run one graph and put its picture at ``out/name.png``."""
    g = Graph()
    g.node("SaveImage", images=build(g), filename_prefix=name)
    start = time.perf_counter()
    made = comfy.run(g.prompt).images[0]
    target = out / f"{name}.png"
    shutil.copyfile(made, target)
    print(f"{name:12s} {time.perf_counter() - start:6.1f} s   {target}", flush=True)
    return target


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="3d peach", help="what to draw (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("output/demo"), help="where the pictures go (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="davae-demo-") as folder:
        base = make_base(Path(folder), REPOSITORY)
        side = 256
        if not tiny_models_are_there():
            family = Family()
            family.write(base / "models")
            print(UNTRAINED, flush=True)
        comfy = HeadlessComfy(base, find_comfyui())
        print(f"ComfyUI {comfy.comfyui.version}, prompt: {options.prompt}", flush=True)
        picture = save(comfy, "davae", options.out, lambda g: with_davae(g, options.prompt, side))
        save(comfy, "native", options.out, lambda g: native(g, options.prompt, side))
        shutil.copyfile(picture, base / "input" / "davae.png")
        save(comfy, "round_trip", options.out, lambda g: round_trip(g, "davae.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
