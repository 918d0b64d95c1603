"""The Tiny SD3.5 node: MODEL and CLIP for stock nodes, from the pack's files."""

from __future__ import annotations

import pytest
import torch

from davae_core import checkpoints, tiny
from davae_core.text_encoder import TextEncoder
from harness.headless import HeadlessComfy

FILES = [
    ("diffusion_models", tiny.MODEL), ("text_encoders", tiny.TEXT_ENCODER), ("vae", tiny.AUTOENCODER),
    ("loras", tiny.ADAPTER), ("loras", tiny.FEW_STEPS), ("latent_upscale_models", tiny.PREDICTOR),
    ("vae_approx", tiny.DECODER),
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """The tiny text encoder, as its file holds it."""
    return checkpoints.load_text_encoder(tiny.FOLDERS["text_encoders"] / tiny.TEXT_ENCODER)


def test_prompt_to_picture_with_stock_text_nodes(run, toys) -> None:
    def build(g):
        model = g.node("DAVAE_TinySD35")
        davae = g.node("DAVAE_Loader", davae_name=tiny.AUTOENCODER, dtype="auto")
        prompts = [g.node("CLIPTextEncode", clip=model[1], text=text) for text in ("3d peach", "")]
        adapted = g.node("DAVAE_Adapter", model=model, adapter_name=tiny.ADAPTER, strength=1.0)
        node = toys.sampler(g, adapted)
        g.prompt[node.id]["inputs"] |= {"positive": prompts[0][0], "negative": prompts[1][0]}
        return {"image": g.node("DAVAE_DetailDecode", samples=node, davae=davae[2], detail_strength=1.0)}

    image = run(build)["image"]
    assert image.shape == (1, 128, 128, 3) and torch.isfinite(image).all()


def test_the_shipped_files_are_offered_by_the_loaders_and_small(comfy: HeadlessComfy) -> None:
    import folder_paths

    for kind, name in FILES:
        assert name in folder_paths.get_filename_list(kind)
    assert sum((tiny.FOLDERS[kind] / name).stat().st_size for kind, name in FILES) < 40 * 2**20


def test_prompts_weights_and_unknown_words(run, encoder: TextEncoder) -> None:
    texts = {
        "plain": "3d peach", "case and commas": "3D, Peach", "weighted": "3d (peach:1.5)", "zero": "3d (peach:0.0)",
        "other": "3d rocket", "unknown": "3d xyzzy", "empty": "", "long": "peach " * 50,
    }  # fmt: skip

    def build(g):
        model = g.node("DAVAE_TinySD35")
        return {name: g.node("CLIPTextEncode", clip=model[1], text=text) for name, text in texts.items()}

    out = {name: value[0][0] for name, value in run(build).items()}
    shape = (1, encoder.config.length, encoder.config.context)
    assert all(context.shape == shape and context.dtype == torch.float32 for context in out.values())
    assert torch.equal(out["plain"], out["case and commas"])
    difference = out["plain"] - out["empty"]
    assert torch.allclose(out["weighted"][0, 1] - out["empty"][0, 1], 1.5 * difference[0, 1], atol=1e-5)
    assert torch.allclose(out["zero"][0, 1], out["empty"][0, 1], atol=1e-6)
    assert not torch.allclose(out["plain"], out["other"])
    assert not torch.allclose(out["unknown"], out["other"])


def test_the_clip_gives_what_the_text_encoder_gives(run, encoder: TextEncoder) -> None:
    def build(g):
        return {"out": g.node("CLIPTextEncode", clip=g.node("DAVAE_TinySD35")[1], text="flat rocket")}

    context, extra = run(build)["out"][0]
    wanted, pooled = encoder.float()(torch.tensor([encoder.pad(encoder.tokenize("flat rocket"))]))
    assert torch.allclose(context, wanted, atol=1e-6) and torch.allclose(extra["pooled_output"], pooled, atol=1e-6)


def test_a_missing_file_is_named_with_its_place(comfy: HeadlessComfy) -> None:
    """Asked of the seam: the node's own files may be in the pack, which a test must not empty."""
    seam = comfy.pack("nodes.comfy_bridge.tiny")
    with pytest.raises(Exception, match=r"davae_gone\.safetensors is missing.*text_encoders.*README"):
        seam._find("text_encoders", "davae_gone.safetensors")


def test_an_encode_node_for_the_real_encoders_says_what_to_use(fails) -> None:
    def build(g):
        texts = {"clip_l": "3d peach", "clip_g": "3d peach", "t5xxl": "3d peach"}
        return g.node("CLIPTextEncodeSD3", clip=g.node("DAVAE_TinySD35")[1], **texts, empty_padding="none")

    assert "CLIP Text Encode" in fails(build)


def test_stock_clip_nodes_accept_it(run) -> None:
    def build(g):
        model = g.node("DAVAE_TinySD35")
        skipped = g.node("CLIPSetLastLayer", clip=model[1], stop_at_clip_layer=-2)
        return {
            "a": g.node("CLIPTextEncode", clip=skipped, text="3d peach"),
            "b": g.node("CLIPTextEncode", clip=model[1], text="3d peach"),
        }

    out = run(build)
    assert torch.equal(out["a"][0][0], out["b"][0][0])
