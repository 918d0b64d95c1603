"""What ComfyUI takes, the nodes take: file names over links, areas, masks, samplers added later, the shift."""

from __future__ import annotations

import shutil

import pytest
import torch

LOADERS = {
    "DAVAE_Loader": ("davae_name", "vae", "davae_file"),
    "DAVAE_Adapter": ("adapter_name", "loras", "adapter_file"),
    "DAVAE_ModelLoader": ("model_name", "diffusion_models", "merged_file"),
    "DAVAE_Sampler": ("adapter_name", "loras", "adapter_file"),
}
WIDGETS = {
    "DAVAE_Loader": {"dtype": "fp32"},
    "DAVAE_Adapter": {"strength": 1.0},
    "DAVAE_ModelLoader": {"dtype": "fp32"},
}


def by_link(g, toys, node):
    """The node with its file name as a link to HarnessConstant ``name``."""
    link = {LOADERS[node][0]: g.node("HarnessConstant", key="name")}
    if node == "DAVAE_Sampler":
        return toys.sampler(g, toys.model(g), **link)
    model = {"model": toys.model(g)} if node == "DAVAE_Adapter" else {}
    return g.node(node, **link, **WIDGETS[node], **model)


@pytest.mark.parametrize("node", LOADERS)
def test_a_file_name_may_come_over_a_link(comfy, run, fails, toys, node):
    seen = len(comfy.log)
    out = run(lambda g: {"value": by_link(g, toys, node)}, inputs={"name": getattr(toys.family, LOADERS[node][2])})
    assert out["value"] is not None
    assert not [line for line in comfy.log[seen:] if line.startswith("WARNING")]  # of a fingerprint that failed
    message = fails(lambda g: by_link(g, toys, node), inputs={"name": "gone.safetensors"})
    assert "'gone.safetensors' was not found" in message and f"models/{LOADERS[node][1]}" in message
    assert "is no file name" in fails(lambda g: by_link(g, toys, node), inputs={"name": None})


def test_a_file_whose_name_comes_over_a_link_is_read_anew_when_it_is_replaced(base, comfy, toys):
    folder, loader, stamps = base / "models" / "loras", comfy.pack("nodes.loaders").DAVAEAdapter, []
    for source in (toys.family.adapter_file, toys.family.zero_adapter_file):
        shutil.copy(folder / source, folder / "replaced.safetensors")
        stamps += [loader.fingerprint_inputs(adapter_name=None), loader.fingerprint_inputs(adapter_name=None)]
    assert stamps[0] == stamps[1] != stamps[2] == stamps[3]


@pytest.mark.parametrize("node", ["DAVAE_Loader", "DAVAE_ModelLoader"])
def test_a_dtype_that_comes_over_a_link_is_checked(fails, toys, node):
    def build(g):
        name, _, file = LOADERS[node]
        return g.node(node, **{name: getattr(toys.family, file)}, dtype=g.node("HarnessConstant", key="dtype"))

    message = fails(build, inputs={"dtype": "int3"})
    assert "'int3'" in message and "auto, fp32, bf16, fp16" in message


def sampled_in_area(run, toys, area, rows):
    """What the unadapted and an adapted MODEL sample with a positive prompt that ``area(g, positive)`` confines."""

    def build(g):
        model = toys.model(g)
        adapted = toys.adapter(g, model, zero=True)
        nodes = {
            "base": toys.ksampler(g, shift(g, model, 3.0), g.node("HarnessConstant", key="base")),
            "adapted": toys.ksampler(g, shift(g, adapted, 3.0), g.node("HarnessConstant", key="latent")),
        }
        for node in nodes.values():
            inputs = g.prompt[node.id]["inputs"]
            inputs["positive"] = area(g, inputs["positive"])[0]
        return nodes

    latents = {"base": {"samples": torch.zeros(1, 16, rows, 8)}, "latent": {"samples": torch.zeros(1, 32, rows, 8)}}
    out = run(build, inputs={"mask": edge_mask(), **latents})
    return out["base"]["samples"], out["adapted"]["samples"]


def shift(g, model, value):
    return g.node("ModelSamplingSD3", model=model, shift=value)


def edge_mask():
    """White in the last rows and columns of a picture: less than the 8 latent pixels that "mask bounds" takes."""
    mask = torch.zeros(1, 128, 128)
    mask[:, 96:, 96:] = 1
    return mask


def percentage(height, y):
    return lambda g, positive: g.node(
        "ConditioningSetAreaPercentage", conditioning=positive, width=1.0, height=height, x=0.0, y=y, strength=1.0
    )


AREAS = {
    "mask bounds at the edge": (
        lambda g, positive: g.node(
            "ConditioningSetMask", conditioning=positive, mask=g.node("HarnessConstant", key="mask"), strength=1.0,
            set_cond_area="mask bounds",
        ),
        8,
    ),
    "percentage on odd rows": (percentage(0.5, 0.5), 7),  # 4 rows that begin at the 4th
    "percentage that ends outside": (percentage(0.75, 0.5), 8),
    "pixels that end outside": (
        lambda g, positive: g.node(
            "ConditioningSetArea", conditioning=positive, width=128, height=128, x=16, y=16, strength=1.0
        ),
        8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AREAS)
def test_an_area_that_ends_outside_is_clamped_as_comfyui_does(run, toys, name):
    base, adapted = sampled_in_area(run, toys, *AREAS[name])
    assert adapted.isfinite().all()
    assert (adapted[:, :16] - base).abs().max() <= 1e-4


def test_a_three_dimensional_area_is_read_as_comfyui_reads_it(comfy):
    """(time, height, width, and where they begin), as packs for video write it: its first two of each count."""
    check = comfy.pack("nodes.comfy_bridge.model").check_area
    check((1, 32, 8, 8), None)
    check((1, 32, 8, 8), (1, 99, 99, 7, 7, 99))
    with pytest.raises(comfy.pack("davae_core.errors").DAVAEError, match="begins outside"):
        check((1, 32, 8, 8), (1, 8, 8, 0, 8, 0))


def encode(g, toys, image, mask=None):
    extra = {} if mask is None else {"mask": mask}
    return g.node("DAVAE_DetailEncode", image=image, davae=toys.davae(g)[2], size_rule="pad", **extra)


def test_a_mask_of_zeros_means_nothing_is_drawn(base, comfy, run, toys, picture):
    """Load Image gives 64 x 64 zeros for files without an alpha channel; stock nodes keep everything then."""
    from PIL import Image

    file = base / "input" / "no_alpha.png"
    file.parent.mkdir(exist_ok=True)
    Image.fromarray((picture[0] * 255).byte().numpy()).save(file)

    def build(g):
        image = g.node("LoadImage", image=file.name)
        latent = encode(g, toys, image, image[1])
        model = toys.adapter(g, toys.model(g))
        rolled = g.node("DAVAE_RerollDetail", model=model, samples=latent, mask=image[1])
        return {
            "latent": latent,
            "sampled": toys.ksampler(g, model, latent),
            "rolled": toys.ksampler(g, rolled, rolled[1]),
        }

    seen = len(comfy.log)
    out = run(build)
    assert out["latent"]["noise_mask"].shape == (1, 1, 128, 192) and not out["latent"]["noise_mask"].any()
    for key in ("sampled", "rolled"):
        assert torch.allclose(out[key]["samples"], out["latent"]["samples"], atol=1e-5), key
    assert "the mask is empty" in "\n".join(comfy.log[seen:])


def test_a_mask_of_another_size_is_scaled_as_stock_nodes_scale_it(run, toys, picture):
    small = torch.zeros(1, 64, 96)
    small[:, 8:40, 16:64] = 1

    def build(g):
        image, mask = g.node("HarnessConstant", key="image"), g.node("HarnessConstant", key="mask")
        davae = toys.davae(g)
        model = toys.adapter(g, toys.model(g))
        ours = encode(g, toys, image, mask)
        plain = encode(g, toys, image)
        stock = g.node("SetLatentNoiseMask", samples=g.node("VAEEncode", pixels=image, vae=davae[0]), mask=mask)
        rolled = g.node("DAVAE_RerollDetail", model=model, samples=plain, mask=mask)
        return {
            "mask": ours,
            "rolled": rolled[1],
            "ours": toys.ksampler(g, model, ours),
            "stock": toys.ksampler(g, model, stock),
        }

    out = run(build, inputs={"image": picture, "mask": small})
    assert out["mask"]["noise_mask"].shape == out["rolled"]["noise_mask"].shape == (1, 1, 128, 192)
    assert out["mask"]["noise_mask"][0, 0, 20:76, 36:124].eq(1).all()
    kept = out["ours"]["samples"].eq(out["stock"]["samples"]).float().mean()
    assert kept > 0.9  # scaled in two steps instead of one: the mask's border differs by less than a latent pixel


def test_samplers_and_schedulers_that_a_pack_adds_later_are_offered_and_run(comfy, run, toys, monkeypatch):
    """Packs put a new list in place of KSampler's, or add to it, after this one has been imported."""
    import comfy.samplers

    ksampler = comfy.samplers.KSampler
    handler = comfy.samplers.SCHEDULER_HANDLERS["simple"]
    monkeypatch.setitem(comfy.samplers.SCHEDULER_HANDLERS, "a_packs_scheduler", handler)
    monkeypatch.setattr(ksampler, "SCHEDULERS", [*ksampler.SCHEDULERS, "a_packs_scheduler"])
    monkeypatch.setattr(ksampler, "SAMPLERS", [*ksampler.SAMPLERS, "a_packs_sampler"])
    out = run(
        lambda g: {
            "theirs": toys.sampler(g, toys.adapter(g, toys.model(g)), scheduler="a_packs_scheduler"),
            "simple": toys.sampler(g, toys.adapter(g, toys.model(g)), scheduler="simple"),
        }
    )
    assert torch.equal(out["theirs"]["samples"], out["simple"]["samples"])
    schema = comfy_node("DAVAE_Sampler").INPUT_TYPES()["required"]
    assert "a_packs_sampler" in str(schema["sampler_name"])


def comfy_node(name):
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[name]


def test_model_sampling_without_a_shift_is_sampled_with(run, toys):
    """ModelSamplingDiscrete puts a class of another schedule on the MODEL, as some packs' nodes do."""

    def build(g):
        model = toys.adapter(g, toys.model(g))
        other = g.node("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
        return {"ours": toys.sampler(g, other), "stock": toys.ksampler(g, other, toys.empty(g))}

    out = run(build)
    assert torch.equal(out["ours"]["samples"], out["stock"]["samples"])


def test_an_empty_latent_of_a_stock_node_is_taken_as_the_stock_sampler_takes_it(run, toys):
    def build(g):
        model, empty = toys.adapter(g, toys.model(g)), g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        return {"ours": toys.sampler(g, model, latent=empty), "stock": toys.ksampler(g, model, empty)}

    out = run(build)
    assert torch.equal(out["ours"]["samples"], out["stock"]["samples"])


@pytest.mark.parametrize("loader", ["adapter", "merged"])
def test_every_sampler_starts_from_the_shift_that_the_adapter_recommends(run, toys, loader):
    told = toys.family.recommended.shift

    def build(g):
        model = toys.model(g)
        if loader == "merged":
            adapted = g.node("DAVAE_ModelLoader", model_name=toys.family.merged_file, dtype="auto")
        else:
            adapted = toys.adapter(g, model)
        sampled = {
            "stock": adapted,
            "by hand": shift(g, adapted, told),
            "other": shift(g, adapted, told + 2),
        }
        if loader == "adapter":
            sampled["other before"] = toys.adapter(g, shift(g, model, told + 2))
        made = {key: toys.ksampler(g, value, toys.empty(g)) for key, value in sampled.items()}
        made["ours"] = toys.sampler(g, adapted)
        return {"adapted": adapted, **made}

    out = run(build)
    assert out.pop("adapted").get_model_object("model_sampling").shift == told != 3.0
    out = {key: value["samples"] for key, value in out.items()}
    assert torch.equal(out["stock"], out["by hand"]) and torch.equal(out["stock"], out["ours"])
    assert not torch.equal(out["stock"], out["other"])
    if loader == "adapter":
        assert torch.equal(out["other before"], out["other"])  # ModelSamplingSD3 wins on either side
