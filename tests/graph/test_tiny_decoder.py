"""A tiny decoder in the graph: previews by it where one fits and the user's method asks for it, and Detail Decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from davae_core import checkpoints, tiny
from davae_core.latent import LatentSpec
from davae_core.tiny_decoder import TinyDecoder, TinyDecoderConfig, decode_bytes
from harness.graph import Graph
from harness.untrained import Family

OURS, OTHER, SMALLER = "toy_decoder.safetensors", "a_decoder_of_another.safetensors", "a_decoder_at_1_8.safetensors"
WIDTHS = (16, 8, 8, 8, 8)


def made(spec: LatentSpec, widths: tuple[int, ...] = WIDTHS) -> TinyDecoder:
    torch.manual_seed(4)
    return TinyDecoder(TinyDecoderConfig(spec, widths)).eval()


@pytest.fixture
def decoders(comfy, base: Path, toys):
    """The folder of tiny decoders, emptied afterwards; beside ours that of another DA-VAE, and files of other kinds."""
    folder = base / "models" / "vae_approx"
    spec = toys.family.latent
    checkpoints.save_tiny_decoder(folder / OURS, made(spec))
    checkpoints.save_tiny_decoder(folder / OTHER, made(Family(seed=77).latent))
    checkpoints.save_tiny_decoder(folder / SMALLER, made(replace(spec, base_factor=4), WIDTHS[:-1]))
    save_file({"1.weight": torch.zeros(4, 16, 3, 3)}, folder / "a_stranger.safetensors")
    (folder / "a_pickle.pth").write_bytes(b"no weights")
    (folder / "a_broken_one.safetensors").write_bytes(b"\xff" * 100)
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture
def method(comfy, monkeypatch):
    """Sets the preview method that the user has chosen."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    def choose(name: str) -> None:
        monkeypatch.setattr(args, "preview_method", LatentPreviewMethod(name))
        if hasattr(latent_preview, "default_preview_method"):  # newer ones set it from this at each run
            monkeypatch.setattr(latent_preview, "default_preview_method", LatentPreviewMethod(name))

    return choose


def sampled(comfy, toys, seed: int = 99, adapter: bool = True, **size: int):
    """A run of the sampler, three steps, that ends in a captured latent."""
    g = Graph()
    model = toys.model(g)
    if adapter:
        latent = toys.ksampler(g, toys.adapter(g, model), toys.empty(g, **size), seed=seed)
    else:
        native = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        latent = toys.ksampler(g, model, native, seed=seed)
    g.node("HarnessCapture", value=latent, key="latent")
    return comfy.run(g.prompt)


# Previews


@pytest.mark.parametrize("name", ["taesd", "auto"])
def test_where_a_decoder_fits_every_preview_is_the_whole_picture(comfy, toys, decoders, method, name):
    method(name)
    result = sampled(comfy, toys, seed=len(name), width=192, height=128, batch=2)
    assert [image.size for image in result.previews] == [(192, 128)] * 3
    assert len({image.tobytes() for image in result.previews}) == 3
    picture = made(toys.family.latent).decode(result.captured["latent"]["samples"][:1]).clamp(-1, 1)
    shown = torch.from_numpy(np.array(result.previews[-1])).movedim(-1, 0) / 127.5 - 1
    assert (shown - picture[0]).abs().max() <= 2 / 127.5  # the last preview is what the latent decodes to
    assert picture.std() > 0.01


@pytest.mark.parametrize("name", ["latent2rgb", "none"])
def test_another_method_stays_what_it_says(comfy, toys, decoders, method, name):
    method(name)
    previews = sampled(comfy, toys, seed=len(name), width=192, height=128).previews
    assert [image.size for image in previews] == ([(12, 8)] * 3 if name == "latent2rgb" else [])


@pytest.mark.parametrize("name", ["taesd", "auto"])
def test_without_a_decoder_that_fits_previews_have_the_bases_colours(comfy, toys, decoders, method, name):
    (decoders / OURS).unlink()
    method(name)
    assert [image.size for image in sampled(comfy, toys, seed=10 + len(name)).previews] == [(8, 8)] * 3


@pytest.mark.parametrize("name", ["taesd", "auto", "latent2rgb"])
def test_other_models_keep_their_previews(comfy, toys, decoders, method, name):
    """Before and after an adapted one has been previewed; the latent of the user's own model keeps its format."""
    method(name)
    sizes = [[i.size for i in sampled(comfy, toys, 20 + len(name) + i, i == 1).previews] for i in range(3)]
    assert sizes[0] == sizes[2] == [(8, 8)] * 3
    assert sizes[1] == [(128, 128) if name != "latent2rgb" else (8, 8)] * 3


def test_formats_of_other_models_go_to_comfyuis_own_choice(comfy, decoders, method):
    """Whatever that is, with every argument it takes; ours is asked about no format but ours."""
    import latent_preview
    from comfy import latent_formats

    method("auto")
    device = torch.device("cpu")
    assert type(latent_preview.get_previewer(device, latent_formats.SD3())) is latent_preview.Latent2RGBPreviewer
    method("none")
    assert latent_preview.get_previewer(device, latent_formats.SD3()) is None
    wrapped = latent_preview.get_previewer
    comfy.pack("nodes.comfy_bridge").install_previews()
    assert latent_preview.get_previewer is wrapped  # a second time changes nothing


def test_a_damaged_decoder_is_told_and_the_colours_are_shown(comfy, toys, decoders, method, caplog):
    path = decoders / OURS
    path.write_bytes(path.read_bytes()[:-500] + bytes([255]) * 500)
    method("taesd")
    assert [image.size for image in sampled(comfy, toys, seed=31).previews] == [(8, 8)] * 3
    assert any(OURS in r.getMessage() and "no previews" in r.getMessage() for r in caplog.records)


def test_a_preview_for_which_memory_is_short_is_left_out(comfy, toys, decoders, method, monkeypatch, caplog):
    def short(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    core = comfy.pack("davae_core.tiny_decoder")
    monkeypatch.setattr(core.TinyDecoder, "tiled", short)
    method("taesd")
    result = sampled(comfy, toys, seed=32)
    assert result.previews == [] and result.captured["latent"]["samples"].isfinite().all()
    assert any("not enough memory for a preview" in record.getMessage() for record in caplog.records)


# Detail Decode


def decode(g: Graph, toys, key: str = "latent", **more: object):
    davae = toys.davae(g)
    samples = g.node("HarnessConstant", key=key)
    return g.node("DAVAE_DetailDecode", samples=samples, davae=davae[2], **{"detail_strength": 1.0, **more})


def test_detail_decode_offers_tiny_decoders_and_no_other_file(comfy, decoders):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["DAVAE_DetailDecode"]
    last = node.define_schema().inputs[-1]
    shipped = {name for name in last.options if name.startswith("davae_tiny")}
    assert last.id == "decoder" and last.optional and last.default == last.options[0] == "full"
    assert set(last.options) - shipped == {"full", OURS, OTHER, SMALLER}


def test_a_tiny_decoder_decodes_at_any_strength_and_batch(run, toys, decoders):
    z = torch.randn(2, 32, 4, 6)
    out = run(
        lambda g: {f"{s}": decode(g, toys, decoder=OURS, detail_strength=s) for s in (0.0, 1.0)},
        inputs={"latent": {"samples": z}},
    )
    model = made(toys.family.latent)
    for strength in (0.0, 1.0):
        expected = ((model.decode(z, strength) + 1) / 2).clamp(0, 1).movedim(1, -1)
        assert out[f"{strength}"].shape == (2, 64, 96, 3)
        assert torch.allclose(out[f"{strength}"], expected, atol=1e-4)
    assert not torch.allclose(out["0.0"], out["1.0"], atol=1e-3)


def test_a_graph_from_before_the_widget_is_decoded_in_full(run, toys, decoders):
    out = run(
        lambda g: {
            "old": decode(g, toys),
            "full": decode(g, toys, decoder="full"),
            "fast": decode(g, toys, decoder=OURS),
        },
        inputs={"latent": {"samples": torch.randn(1, 32, 4, 4)}},
    )
    assert torch.equal(out["old"], out["full"]) and not torch.allclose(out["fast"], out["full"], atol=1e-2)


def test_padding_is_cut_off_as_by_the_full_decoder(run, toys, decoders):
    def build(g):
        davae = toys.davae(g)
        image = g.node("HarnessConstant", key="image")
        latent = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")
        return {
            "image": g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0, decoder=OURS)
        }

    assert run(build, inputs={"image": torch.rand(1, 70, 100, 3)})["image"].shape == (1, 70, 100, 3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (OTHER, r"was made for another DA-VAE.*davae_toy_autoencoder.*Choose a tiny decoder"),
        (SMALLER, r"decodes latents of 16 \+ 16 channels at 1/8, but these have 16 \+ 16 at 1/16"),
        ("a_stranger.safetensors", r"choose a tiny decoder of DA-VAE latents \(models/vae_approx\)"),
        ("gone.safetensors", r"'gone\.safetensors' was not found; it belongs into .*vae_approx"),
    ],
)
def test_what_does_not_fit_is_named(fails, toys, decoders, name, said):
    import re

    message = fails(lambda g: decode(g, toys, decoder=name), inputs={"latent": {"samples": torch.randn(1, 32, 4, 4)}})
    assert re.search(said, message) and name in message


def test_a_decoder_that_is_replaced_is_read_anew(run, toys, decoders):
    """And otherwise ComfyUI keeps the image that it has."""

    def image():
        def build(g):
            more = {"detail_strength": 1.0, "decoder": OURS}
            return {"image": g.node("DAVAE_DetailDecode", samples=toys.empty(g), davae=toys.davae(g)[2], **more)}

        return run(build)["image"]

    first, again = image(), image()
    assert again is first
    other = made(toys.family.latent)
    with torch.no_grad():
        other[-1].bias += 0.2
    checkpoints.save_tiny_decoder(decoders / OURS, other)
    assert not torch.allclose(image(), first, atol=1e-2)


def test_with_little_memory_it_works_in_strips_and_gives_the_same(run, toys, decoders, monkeypatch, comfy):
    from comfy import model_management

    core = comfy.pack("davae_core.tiny_decoder")
    calls, original = [], core.TinyDecoder.decode_tiled
    monkeypatch.setattr(
        core.TinyDecoder, "decode_tiled", lambda *a, **k: (calls.append(k["rows"]), original(*a, **k))[1]
    )
    inputs = {"latent": {"samples": torch.randn(1, 32, 60, 2)}}
    plenty = run(lambda g: {"image": decode(g, toys, decoder=OURS)}, inputs=inputs)["image"]
    assert not calls
    monkeypatch.setattr(model_management, "get_free_memory", lambda *_, **__: 1.0)
    little = run(lambda g: {"image": decode(g, toys, decoder=OURS, detail_strength=1.0)}, inputs=dict(inputs, more=1))
    assert calls == [64] and (plenty - little["image"]).abs().max() <= 1e-4
    config = TinyDecoderConfig(toys.family.latent, WIDTHS)
    assert decode_bytes(config, 4096, 512, 4, 64) < 0.5 * decode_bytes(config, 4096, 512, 4)


# The one that ships


def test_the_shipped_one_previews_and_decodes_the_tiny_family(comfy, toys, method):
    """The last preview is the picture; and the full decoder's picture is near."""
    method("auto")
    g = Graph()
    model = g.node("DAVAE_TinySD35")
    davae = g.node("DAVAE_Loader", davae_name=tiny.AUTOENCODER, dtype="fp32")
    prompts = [g.node("CLIPTextEncode", clip=model[1], text=text) for text in ("3d peach", "")]
    adapted = g.node("DAVAE_Adapter", model=model, adapter_name=tiny.ADAPTER, strength=1.0)
    node = toys.sampler(g, adapted, steps=8, cfg=1.5)
    g.prompt[node.id]["inputs"] |= {"positive": prompts[0][0], "negative": prompts[1][0]}
    for name in ("full", tiny.DECODER):
        image = g.node("DAVAE_DetailDecode", samples=node, davae=davae[2], detail_strength=1.0, decoder=name)
        g.node("HarnessCapture", value=image, key=name)
    result = comfy.run(g.prompt)
    full, fast = result.captured["full"][0], result.captured[tiny.DECODER][0]
    shown = torch.from_numpy(np.array(result.previews[-1])) / 255
    assert shown.shape == full.shape == (128, 128, 3)
    assert (shown - fast).abs().max() < 0.01
    assert (fast - full).square().mean() < 0.006  # 22 dB
    assert full.std() > 0.1
