"""What the server soak draws: every node of the pack, stock nodes on its objects, and prompts that must fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from davae_core import tiny

from ..graph import Graph, Node
from ..untrained import Family

PICTURE, MASK = "soak.png", "soak_mask.png"
FAMILY = Family()
Build = Callable[[Graph, int], Node]


def write_inputs(base: Path) -> None:
    """Toy models and input pictures, into a base directory. The picture needs padding: 150 x 101 px."""
    from PIL import Image, ImageDraw

    FAMILY.write(base / "models")
    image = Image.linear_gradient("L").resize((150, 101)).convert("RGB")
    ImageDraw.Draw(image).ellipse((40, 20, 110, 80), fill=(200, 80, 40))
    image.save(base / "input" / PICTURE)
    mask = Image.new("RGBA", (150, 101), (0, 0, 0, 255))
    ImageDraw.Draw(mask).rectangle((30, 30, 90, 70), fill=(0, 0, 0, 0))
    mask.save(base / "input" / MASK)


def graph(name: str, seed: int) -> Graph:
    """One of :data:`GOOD` or :data:`BAD`, which saves a picture."""
    g = Graph()
    image = {**GOOD, **{key: build for key, (build, _) in BAD.items()}}[name](g, seed)
    g.node("SaveImage", images=image, filename_prefix=f"soak_{name.replace(' ', '_')}")
    return g


def fingerprints() -> tuple[Graph, list[str]]:
    """A graph that hashes the weights of every loader's objects, and the ids of the nodes that do."""
    g = Graph()
    model, davae = _tiny(g), _davae(g)
    base = g.node("UNETLoader", unet_name=FAMILY.model_file, weight_dtype="default")
    merged = g.node("DAVAE_ModelLoader", model_name=FAMILY.merged_file, dtype="auto")
    things = [model[0], _adapted(g, model)[0], davae[0], davae[1], davae[2], base[0], merged[0]]
    things.append(g.node("DAVAE_Adapter", model=base, adapter_name=FAMILY.adapter_file, strength=1.0)[0])
    return g, [g.node("SoakFingerprint", value=thing).id for thing in things]


def _tiny(g: Graph) -> Node:
    return g.node("DAVAE_TinySD35")


def _davae(g: Graph) -> Node:
    return g.node("DAVAE_Loader", davae_name=tiny.AUTOENCODER, dtype="auto")


def _adapted(g: Graph, model: Node) -> Node:
    return g.node("DAVAE_Adapter", model=model, adapter_name=tiny.ADAPTER, strength=1.0)


def _fresh(g: Graph, value: Node | list) -> Node:
    return g.node("SoakFresh", value=value)


def _text(g: Graph, clip: Node) -> dict[str, Node]:
    words = {"positive": "3d peach", "negative": ""}
    return {key: g.node("CLIPTextEncode", clip=clip[1], text=text) for key, text in words.items()}


def _sampled(g: Graph, model: Node | list, text: dict, latent: Node | list, seed: int, **settings: object) -> Node:
    defaults = {"seed": seed, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return g.node("KSampler", model=model, latent_image=_fresh(g, latent), **text, **{**defaults, **settings})


def _decoded(g: Graph, latent: Node | list, davae: Node) -> Node:
    return g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0)


def _encoded(g: Graph, davae: Node, mask: bool = False) -> Node:
    image = g.node("LoadImage", image=PICTURE)
    more = {"mask": g.node("LoadImage", image=MASK)[1]} if mask else {}
    return g.node("DAVAE_DetailEncode", image=_fresh(g, image), davae=davae[2], size_rule="pad", **more)


def text_to_image(g: Graph, seed: int) -> Node:
    """The pack's own nodes, from a prompt."""
    model, davae = _tiny(g), _davae(g)
    latent = g.node("DAVAE_EmptyLatent", width=128, height=128, batch_size=1)
    sampled = g.node(
        "DAVAE_Sampler", model=_adapted(g, model), adapter_name="(already adapted)", seed=seed, steps=4, cfg=0.0,
        sampler_name="euler", scheduler="simple", shift=0.0, denoise=1.0, width=128, height=128,
        latent=_fresh(g, latent), **_text(g, model),
    )  # fmt: skip
    return _decoded(g, sampled, davae)


def base_model(g: Graph, seed: int) -> Node:
    """The unadapted model and the base VAE."""
    model, davae = _tiny(g), _davae(g)
    empty = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    return g.node("VAEDecode", samples=_sampled(g, model, _text(g, model), empty, seed), vae=davae[1])


def image_to_image(g: Graph, seed: int) -> Node:
    """A padded picture, through a stock sampler."""
    model, davae = _tiny(g), _davae(g)
    sampled = _sampled(g, _adapted(g, model), _text(g, model), _encoded(g, davae), seed, denoise=0.5)
    return _decoded(g, sampled, davae)


def inpainting(g: Graph, seed: int) -> Node:
    """A part of a picture anew."""
    model, davae = _tiny(g), _davae(g)
    sampled = _sampled(g, _adapted(g, model), _text(g, model), _encoded(g, davae, mask=True), seed)
    return _decoded(g, sampled, davae)


def new_detail(g: Graph, seed: int) -> Node:
    """Another base under the detail, then the detail anew."""
    model, davae = _tiny(g), _davae(g)
    latent = _encoded(g, davae)
    swapped = g.node("DAVAE_SwapBase", samples=latent, base_latent=latent[1], davae=davae[2])
    rolled = g.node("DAVAE_RerollDetail", model=_adapted(g, model), samples=swapped)
    return _decoded(g, _sampled(g, rolled[0], _text(g, model), rolled[1], seed, sampler_name="uni_pc"), davae)


def stock_vae(g: Graph, seed: int) -> Node:
    """Stock VAE nodes, tiled and not, around a batch of two."""
    davae = _davae(g)
    image = g.node("ImageScale", image=g.node("LoadImage", image=PICTURE), upscale_method="bilinear", width=128,
                   height=96, crop="disabled")  # fmt: skip
    tile = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    latent = g.node("VAEEncodeTiled", pixels=_fresh(g, image), vae=davae[0], **tile)
    both = g.node("RepeatLatentBatch", samples=latent, amount=2)
    decoded = g.node("VAEDecode", samples=both, vae=davae[0])
    again = g.node("VAEEncode", pixels=decoded, vae=davae[0])
    return g.node("VAEDecodeTiled", samples=again, vae=davae[0], **tile)


def toy_models(g: Graph, seed: int) -> Node:
    """A stock loader's model with an adapter, then the merged model, on one latent."""
    davae = g.node("DAVAE_Loader", davae_name=FAMILY.davae_file, dtype="auto")
    widths = {"context": FAMILY.model.context, "pooled": FAMILY.model.pooled}
    text = {key: g.node("HarnessConditioning", **widths, seed=i) for i, key in enumerate(("positive", "negative"))}
    base = g.node("UNETLoader", unet_name=FAMILY.model_file, weight_dtype="default")
    adapted = g.node("DAVAE_Adapter", model=base, adapter_name=FAMILY.adapter_file, strength=0.8)
    merged = g.node("DAVAE_ModelLoader", model_name=FAMILY.merged_file, dtype="auto")
    empty = g.node("DAVAE_EmptyLatent", width=96, height=128, batch_size=1)
    first = _sampled(g, adapted, text, empty, seed)
    return _decoded(g, _sampled(g, merged, text, first, seed, denoise=0.4), davae)


def ordinary_latent_decoded(g: Graph, seed: int) -> Node:
    """Fails."""
    return _decoded(g, _fresh(g, g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)), _davae(g))


def unadapted_sampled(g: Graph, seed: int) -> Node:
    """Fails."""
    model, davae = _tiny(g), _davae(g)
    latent = g.node("DAVAE_EmptyLatent", width=64, height=64, batch_size=1)
    rolled = g.node("DAVAE_RerollDetail", model=model, samples=_fresh(g, latent))
    return _decoded(g, rolled[1], davae)


def wrong_text(g: Graph, seed: int) -> Node:
    """Fails."""
    model, davae = _tiny(g), _davae(g)
    text = {key: g.node("HarnessConditioning", context=48, pooled=24, seed=1) for key in ("positive", "negative")}
    latent = g.node("DAVAE_EmptyLatent", width=64, height=64, batch_size=1)
    return _decoded(g, _sampled(g, _adapted(g, model), text, latent, seed), davae)


GOOD: dict[str, Build] = {
    build.__name__.replace("_", " "): build
    for build in (
        text_to_image, base_model, image_to_image, inpainting, new_detail, stock_vae, toy_models,
    )
}  # fmt: skip
# With a part of the message that must come.
BAD: dict[str, tuple[Build, str]] = {
    "ordinary latent decoded": (ordinary_latent_decoded, "it is an ordinary latent"),
    "unadapted sampled": (unadapted_sampled, "the MODEL is not adapted"),
    "wrong text": (wrong_text, "the CONDITIONING has text tokens of width 48"),
}
