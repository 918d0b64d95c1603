"""The models in a real ComfyUI, reached as its samplers and VAE nodes reach them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from harness.headless import HeadlessComfy
from harness.locate import REPOSITORY, find_comfyui
from harness.scratch import make_base

from . import core
from .setup import TEXT_TOKENS, Setup

Conditioning = list[list[Any]]


@cache
def booted(device: str) -> HeadlessComfy:
    """ComfyUI with this pack, in this process, without previews; its attention is torch's, like that of all others.

    That is ComfyUI's own choice on a GPU. On a CPU it takes another, two or three times slower with many tokens.
    """
    folder = Path(tempfile.mkdtemp(prefix="davae-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if device == "cuda":
        os.environ["DAVAE_GPU"] = "1"
    return HeadlessComfy(make_base(folder, REPOSITORY), find_comfyui(), "none", ["--use-pytorch-cross-attention"])


@cache
def native(setup: Setup) -> Any:
    """The unadapted MODEL, with the weights of :func:`core.native`.

    ComfyUI takes the width of an SD3 model for 64 x its blocks; where it is cut to fewer, it is told so.
    """
    pack = booted(setup.device).pack
    import comfy.model_detection  # type: ignore[import-not-found,unused-ignore]
    import comfy.model_management as management  # type: ignore[import-not-found,unused-ignore]

    state = core.native_state(setup)
    config = comfy.model_detection.model_config_from_unet(dict(state), "")
    config.unet_config["num_blocks"] = setup.mmdit().depth
    config.set_inference_dtype(setup.torch_dtype, None)
    with torch.no_grad():
        model = config.get_model({}, "", device=torch.device("meta"))
        model.diffusion_model.load_state_dict(state, assign=True)
    model.device = management.unet_offload_device()
    versions = pack("nodes.comfy_bridge.versions")
    return versions.core_patcher(model, management.get_torch_device(), management.unet_offload_device())


@cache
def adapted(setup: Setup) -> Any:
    """The adapted MODEL, as the DA-VAE Adapter node makes it."""
    rebuild = booted(setup.device).pack("nodes.comfy_bridge.rebuild")
    return rebuild.apply_adapter(native(setup), core.adapter(setup))


def conditioning(setup: Setup) -> tuple[Conditioning, Conditioning]:
    """Positive and negative, of random numbers."""
    config = setup.mmdit()
    generator = torch.Generator().manual_seed(5)

    def one() -> Conditioning:
        tokens = torch.randn(1, TEXT_TOKENS, config.context, generator=generator)
        return [[tokens, {"pooled_output": torch.randn(1, config.pooled, generator=generator)}]]

    return one(), one()


def model_call(patcher: Any, setup: Setup, is_adapted: bool, size: int, guided: bool = True) -> Callable[[], Any]:
    """One call, as every stock sampler makes it at each step; with CFG of both texts."""
    import comfy.model_management as management  # type: ignore[import-not-found,unused-ignore]
    import comfy.sampler_helpers  # type: ignore[import-not-found,unused-ignore]
    import comfy.samplers  # type: ignore[import-not-found,unused-ignore]

    x = core.noise(setup, *core.latent_shape(setup, is_adapted, size)).float()
    named = dict(zip(("positive", "negative"), map(comfy.sampler_helpers.convert_cond, conditioning(setup))))
    conds = comfy.samplers.process_conds(patcher.model, x, named, x.device, x, None, 0)
    sigma = torch.full((setup.batch,), 0.5, device=x.device)
    need = patcher.model.memory_required([(2 if guided else 1) * x.shape[0], *x.shape[1:]])
    management.load_models_gpu([patcher], memory_required=need)
    patcher.pre_run()
    asked = [conds["positive"], conds["negative"]] if guided else [conds["positive"]]
    return lambda: comfy.samplers.calc_cond_batch(patcher.model, asked, x, sigma, patcher.model_options)


@cache
def davae(setup: Setup) -> Any:
    """What the DA-VAE Loader puts out as DAVAE."""
    autoencoder = booted(setup.device).pack("nodes.comfy_bridge.autoencoder")
    import comfy.model_management as management  # type: ignore[import-not-found,unused-ignore]
    import comfy.model_patcher  # type: ignore[import-not-found,unused-ignore]

    device, offload = management.vae_device(), management.vae_offload_device()
    model = core.davae(setup).to(offload)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    return autoencoder.AutoencoderHandle(model, patcher, "random.safetensors")


@cache
def sd3_vae(setup: Setup) -> Any:
    """ComfyUI's own VAE object of an SD3 VAE file."""
    booted(setup.device)
    import comfy.sd  # type: ignore[import-not-found,unused-ignore]

    state = {name: tensor.cpu() for name, tensor in core.sd3_vae(setup).state_dict().items()}
    return comfy.sd.VAE(sd=state, dtype=setup.torch_dtype)


def picture(
    setup: Setup, model: Any, vae: Any, is_adapted: bool, size: int, enlarge: int = 1, davae: Any = None
) -> Callable[[], Any]:
    """Noise to picture by a graph of stock nodes, and of ours for the adapted model.

    Args:
        setup: steps, batch.
        model: a MODEL.
        vae: a VAE, for the decode of an unadapted model.
        is_adapted: whether it is an adapted one.
        size: of the picture that is drawn.
        enlarge: how much bicubic enlargement comes after it.
        davae: a DAVAE, for the decode of an adapted one.
    """
    from harness.graph import Graph

    positive, negative = conditioning(setup)
    given = {"model": model, "vae": davae if is_adapted else vae, "positive": positive, "negative": negative}
    g = Graph()
    link = {name: g.node("HarnessConstant", key=name) for name in given}
    empty = "DAVAE_EmptyLatent" if is_adapted else "EmptySD3LatentImage"
    latent = g.node(empty, width=size, height=size, batch_size=setup.batch)
    sampled = g.node(
        "KSampler", model=link["model"], positive=link["positive"], negative=link["negative"], latent_image=latent,
        seed=1, steps=setup.steps, cfg=2.5, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    if is_adapted:
        image = g.node("DAVAE_DetailDecode", samples=sampled, davae=link["vae"], detail_strength=1.0)
    else:
        image = g.node("VAEDecode", samples=sampled, vae=link["vae"])
    if enlarge > 1:
        image = g.node("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=float(enlarge))
    g.node("HarnessCapture", value=image, key="image")
    runner = booted(setup.device)
    return lambda: runner.run(g.prompt, inputs=given).captured["image"]
