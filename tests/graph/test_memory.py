"""When memory is short or ends: strips, then fewer rows, with the same result, for our nodes and for stock ones."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

OOM = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "accelerator": lambda: getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 17.5 GB, other allocations: 1 GB)"),
    "directml": lambda: RuntimeError(
        "Could not allocate tensor with 4294967296 bytes. There is not enough GPU video memory available!"
    ),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    "python": lambda: MemoryError(),
}


@pytest.fixture
def memory(run, toys, monkeypatch):
    """A DA-VAE, and ``with memory.ends(problem, rows)``: whole pictures, and strips of so many rows, end with
    ``problem``; the block is given the ways that were gone."""

    class Memory:
        handle = run(lambda g: {"handle": toys.davae(g)[2]})["handle"]

        @contextmanager
        def ends(self, problem, rows=()):
            gone: list[str] = []
            with monkeypatch.context() as patch:
                for name in ("encode", "decode", "encode_small"):
                    patch.setattr(self.handle.model, name, self._failing(name, problem, gone))
                for name in ("encode_tiled", "decode_tiled", "encode_small_tiled"):
                    patch.setattr(self.handle.model, name, self._strips(name, problem, rows, gone))
                yield gone

        def _failing(self, name, problem, gone):
            def fails(*_, **__):
                gone.append(name)
                raise problem()

            return fails

        def _strips(self, name, problem, rows, gone):
            original = getattr(self.handle.model, name)

            def works(*arguments, **named):
                gone.append(f"{name} {named['rows']}")
                if named["rows"] in rows:
                    raise problem()
                return original(*arguments, **named)

            return works

    return Memory()


@pytest.mark.parametrize("device", OOM)
def test_what_any_device_says_when_memory_ends_leads_to_strips_with_the_same_result(memory, picture, device):
    handle = memory.handle
    z = handle.encode(picture)
    image = handle.decode(z)
    with memory.ends(OOM[device]) as gone:
        assert (handle.encode(picture) - z).abs().max() <= 1e-4
        assert (handle.decode(z) - image).abs().max() <= 1e-4
    assert gone == ["encode", "encode_tiled 64", "encode_small_tiled 64", "decode", "decode_tiled 64"]


def test_where_strips_do_not_fit_either_they_get_fewer_rows(memory, picture):
    handle = memory.handle
    z = handle.encode(picture)
    image = handle.decode(z)
    with memory.ends(OOM["cuda"], rows=(64,)) as gone:
        assert (handle.decode(z) - image).abs().max() <= 1e-4
    assert gone == ["decode", "decode_tiled 64", "decode_tiled 16"]
    with memory.ends(OOM["mps"], rows=(64, 16)), pytest.raises(RuntimeError, match="MPS backend out of memory"):
        handle.decode(z)


def test_other_errors_are_not_taken_for_a_lack_of_memory(memory, picture):
    z = memory.handle.encode(picture)
    with memory.ends(lambda: RuntimeError("shapes do not fit")) as gone, pytest.raises(RuntimeError, match="shapes"):
        memory.handle.decode(z)
    assert gone == ["decode"]


@pytest.mark.parametrize("device", ["cuda", "accelerator", "mps"])
def test_stock_nodes_fall_back_to_our_strips_and_not_to_tiles_with_seams(memory, picture, device):
    handle = memory.handle
    vae, base_vae = handle.stock_vae(), handle.base_vae()
    z, z_base = vae.encode(picture), base_vae.encode(picture)
    image = vae.decode(z)
    with torch.no_grad(), memory.ends(OOM[device], rows=(64,)) as gone:
        assert (vae.encode(picture) - z).abs().max() <= 1e-4
        assert (vae.decode(z) - image).abs().max() <= 1e-4
        assert (base_vae.encode(picture) - z_base).abs().max() <= 1e-4
        assert (vae.decode_tiled(z) - image).abs().max() <= 1e-4
    assert "encode_tiled 16" in gone and "decode_tiled 16" in gone and "encode_small_tiled 16" in gone


def test_comfyui_is_asked_for_what_will_be_used(memory, monkeypatch):
    import comfy.model_management as management

    whole, strips, fewest = (way.bytes for way in memory.handle.decoding(128, 128).ways)
    vae, shape = memory.handle.stock_vae(), (1, 32, 128, 128)
    assert whole > strips > fewest
    for free, asked in ((whole, whole), (whole - 1, strips), (strips - 1, fewest), (0, fewest)):
        monkeypatch.setattr(management, "get_free_memory", lambda *_, _free=free, **__: _free)
        assert memory.handle.decoding(128, 128).need() == asked
        assert vae.memory_used_decode(shape, torch.float32) == asked


@pytest.mark.parametrize("node", ["VAEDecode", "VAEDecodeTiled", "VAEEncode", "VAEEncodeTiled"])
def test_tiled_nodes_ask_for_the_strips_that_run_and_not_for_a_tile(run, memory, picture, monkeypatch, node):
    """Newer ComfyUI counts the memory of one tile; ours are strips of the whole picture, whatever the tile size."""
    import comfy.model_management as management

    vae, asked, load = memory.handle.stock_vae(), [], management.load_models_gpu

    def spy(models, memory_required=0, **rest):
        asked.append(memory_required)
        return load(models, memory_required, **rest)

    z = {"samples": vae.encode(picture)}
    monkeypatch.setattr(management, "load_models_gpu", spy)
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4} if "Tiled" in node else {}
    given = {"samples": "z"} if "Decode" in node else {"pixels": "image"}

    def build(g):
        ours = {name: g.node("HarnessConstant", key=key) for name, key in (*given.items(), ("vae", "vae"))}
        return {"x": g.node(node, **ours, **tiles)}

    run(build, inputs={"vae": vae, "z": z, "image": picture})
    height, width = picture.shape[1:3]
    rows, columns = z["samples"].shape[2:]
    ways = memory.handle.decoding(rows, columns) if "Decode" in node else memory.handle.encoding(height, width)
    assert min(asked) >= min(way.bytes for way in ways.ways)


def test_a_vae_that_is_given_another_device_keeps_its_face(run, memory, picture):
    """As Select VAE Device of newer ComfyUI does it: a copy with another patcher, whose model becomes the VAE's."""
    handle = memory.handle
    for vae in (handle.stock_vae(), handle.base_vae()):
        expected = vae.encode(picture)
        moved = copy.copy(vae)
        moved.patcher = vae.patcher.clone()
        moved.first_stage_model = moved.patcher.model
        assert torch.equal(moved.encode(picture), expected) and torch.equal(
            moved.decode(expected), vae.decode(expected)
        )
        assert moved.first_stage_model.handle.patcher is moved.patcher
        assert vae.first_stage_model.handle.patcher is vae.patcher
    vae = handle.stock_vae()
    moved, z = copy.copy(vae), vae.encode(picture)
    moved.first_stage_model = moved.patcher.model
    with torch.no_grad(), memory.ends(OOM["cuda"]) as gone:
        assert (moved.encode(picture) - z).abs().max() <= 1e-4
    assert "encode_tiled 64" in gone


def test_every_catch_of_a_lack_of_memory_goes_through_one_function(comfy):
    import pathlib

    folder = pathlib.Path(comfy.pack("nodes").__file__).parent
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.py") if "OutOfMemory" in file.read_text()]
    assert files == ["comfy_bridge/memory.py"]


@pytest.mark.parametrize(("which", "factor"), [(0, 16), (1, 8)])
def test_a_picture_smaller_than_a_pixel_of_the_latent_is_named(fails, toys, picture, which, factor):
    def build(g):
        return g.node("VAEEncode", pixels=g.node("HarnessConstant", key="image"), vae=toys.davae(g)[which])

    assert f"smaller than {factor} x {factor} px" in fails(build, inputs={"image": picture[:, : factor - 1]})


def test_an_empty_batch_and_a_video_are_named(memory, picture):
    handle = memory.handle
    vae, base_vae = handle.stock_vae(), handle.base_vae()
    error = type(handle).decode.__globals__["LatentSpec"].check.__globals__["LatentError"]
    for call in (
        lambda: vae.decode(torch.zeros(0, 32, 8, 8)),
        lambda: base_vae.decode(torch.zeros(0, 16, 8, 8)),
        lambda: vae.encode(torch.zeros(0, 64, 64, 3)),
        lambda: base_vae.encode(torch.zeros(0, 64, 64, 3)),
        lambda: vae.encode(torch.zeros(1, 3, 64, 64, 3)),
    ):
        with pytest.raises(error, match=r"has shape|have shape"):
            call()


@pytest.mark.parametrize("shape", [(0, 64, 64, 3), (1, 2, 64, 64, 3)])
def test_detail_encode_names_an_empty_batch_and_a_video(fails, toys, shape):
    def build(g):
        image = g.node("HarnessConstant", key="image")
        return g.node("DAVAE_DetailEncode", image=image, davae=toys.davae(g)[2], size_rule="pad")[0]

    message = fails(build, inputs={"image": torch.zeros(shape)})
    assert str(list(shape)) in message and "[batch, height, width, 3]" in message


@pytest.mark.parametrize("node", ["decode", "sampler", "base", "to base", "reroll"])
def test_every_node_names_an_empty_batch_of_latents(fails, toys, node):
    def build(g):
        latent = g.node("HarnessConstant", key="latent")
        if node == "decode":
            return g.node("DAVAE_DetailDecode", samples=latent, davae=toys.davae(g)[2], detail_strength=1.0)
        if node == "sampler":
            return toys.sampler(g, toys.adapter(g, toys.model(g)), latent=latent)
        if node == "reroll":
            return g.node("DAVAE_RerollDetail", model=toys.adapter(g, toys.model(g)), samples=latent)
        return g.node("DAVAE_FromBaseLatent" if node == "base" else "DAVAE_ToBaseLatent", samples=latent)

    channels = 16 if node == "base" else 32
    message = fails(build, inputs={"latent": {"samples": torch.zeros(0, channels, 8, 8)}})
    assert f"[0, {channels}, 8, 8]" in message


def test_nodes_that_cut_up_the_vae_are_told_what_to_use(memory):
    stage = memory.handle.stock_vae().first_stage_model
    assert not hasattr(stage, "decoder")
    with pytest.raises(AttributeError, match=r"stock VAE Encode and VAE Decode nodes, tiled or not"):
        stage.encoder.forward(torch.zeros(1))
