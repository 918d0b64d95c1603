"""The Tiny SD3.5 node: MODEL and CLIP for stock nodes."""

from __future__ import annotations

import torch


def test_prompt_to_picture_with_stock_text_nodes(run, toys):
    def build(g):
        tiny, davae = g.node("DAVAE_TinySD35"), toys.davae(g)
        prompts = [g.node("CLIPTextEncode", clip=tiny[1], text=text) for text in ("3d peach", "")]
        node = toys.sampler(g, toys.adapter(g, tiny[0]))
        g.prompt[node.id]["inputs"] |= {"positive": prompts[0][0], "negative": prompts[1][0]}
        return {"image": g.node("DAVAE_DetailDecode", samples=node, davae=davae[2], detail_strength=1.0)}

    assert run(build)["image"].shape == (1, 128, 128, 3)


def test_prompts_weights_and_unknown_words(run, toys):
    texts = {
        "plain": "3d peach", "case and commas": "3D, Peach", "weighted": "3d (peach:1.5)", "zero": "3d (peach:0.0)",
        "other": "3d rocket", "unknown": "3d xyzzy", "empty": "", "long": "peach " * 50,
    }  # fmt: skip

    def build(g):
        tiny = g.node("DAVAE_TinySD35")
        return {name: g.node("CLIPTextEncode", clip=tiny[1], text=text) for name, text in texts.items()}

    out = {name: value[0][0] for name, value in run(build).items()}
    assert all(context.shape == (1, 8, toys.family.model.context) for context in out.values())
    assert torch.equal(out["plain"], out["case and commas"])
    difference = out["plain"] - out["empty"]
    assert torch.allclose(out["weighted"][0, 1] - out["empty"][0, 1], 1.5 * difference[0, 1], atol=1e-5)
    assert torch.allclose(out["zero"][0, 1], out["empty"][0, 1], atol=1e-6)
    assert not torch.allclose(out["plain"], out["other"])
    assert not torch.allclose(out["unknown"], out["other"])


def test_an_encode_node_for_the_real_encoders_says_what_to_use(fails):
    def build(g):
        texts = {"clip_l": "3d peach", "clip_g": "3d peach", "t5xxl": "3d peach"}
        return g.node("CLIPTextEncodeSD3", clip=g.node("DAVAE_TinySD35")[1], **texts, empty_padding="none")

    assert "CLIP Text Encode" in fails(build)


def test_stock_clip_nodes_accept_it(run, toys):
    def build(g):
        tiny = g.node("DAVAE_TinySD35")
        skipped = g.node("CLIPSetLastLayer", clip=tiny[1], stop_at_clip_layer=-2)
        return {
            "a": g.node("CLIPTextEncode", clip=skipped, text="3d peach"),
            "b": g.node("CLIPTextEncode", clip=tiny[1], text="3d peach"),
        }

    out = run(build)
    assert torch.equal(out["a"][0][0], out["b"][0][0])
