"""Loaders: autoencoder, adapter, merged model, and the tiny model."""

import torch
from comfy_api.latest import io

from ..davae_core import checkpoints
from . import comfy_bridge
from .choices import require_choice

CATEGORY = "DA-VAE"
DAVAESocket = io.Custom("DAVAE")
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights_dtype(name: str) -> torch.dtype | None:
    """The dtype of the widget, None for "auto"; a DAVAEError for what only a link can bring."""
    require_choice("dtype", name, DTYPES)
    return DTYPES[name]


class DAVAELoader(io.ComfyNode):
    """A DA-VAE autoencoder from models/vae."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_Loader",
            display_name="DA-VAE Loader",
            category=CATEGORY,
            description="Loads a DA-VAE autoencoder: a VAE whose latent is the ordinary latent of the half-size image "
            "plus as many channels again for the detail.",
            search_aliases=["DAVAE", "load VAE", "detail VAE"],
            inputs=[
                io.Combo.Input(
                    "davae_name",
                    options=comfy_bridge.file_names("vae"),
                    tooltip="A DA-VAE autoencoder file, from models/vae. An ordinary VAE file is not one.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="Precision of the weights. auto: what ComfyUI uses for VAEs on this machine.",
                ),
            ],
            outputs=[
                io.Vae.Output(display_name="VAE", tooltip="The whole DA-VAE, for all stock VAE nodes."),
                io.Vae.Output(display_name="base VAE", tooltip="The ordinary VAE inside it, for half-size images."),
                DAVAESocket.Output(
                    display_name="DAVAE", tooltip="For Detail Encode, Detail Decode and the latent nodes."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, davae_name: str | None = None) -> bool | str:
        return comfy_bridge.check_file("vae", davae_name)

    @classmethod
    def fingerprint_inputs(cls, davae_name: str | None, **_: object) -> str:
        return comfy_bridge.file_stamp("vae", davae_name)

    @classmethod
    def execute(cls, davae_name: str, dtype: str) -> io.NodeOutput:
        handle = comfy_bridge.load_autoencoder(comfy_bridge.require_file("vae", davae_name), weights_dtype(dtype))
        return io.NodeOutput(handle.stock_vae(), handle.base_vae(), handle)


class DAVAEAdapter(io.ComfyNode):
    """Adapt an SD3.5 MODEL to DA-VAE latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_Adapter",
            display_name="DA-VAE Adapter",
            category=CATEGORY,
            description="Makes an SD3.5 MODEL work on DA-VAE latents. The MODEL you connect is not changed; LoRAs and "
            "sampling settings on it carry over, and more can be put on the result.",
            search_aliases=["DAVAE", "adapter", "SD3.5 2048"],
            inputs=[
                io.Model.Input("model", tooltip="The SD3.5 model that the adapter was trained for, not yet adapted."),
                io.Combo.Input(
                    "adapter_name",
                    options=comfy_bridge.file_names("loras"),
                    tooltip="A DA-VAE adapter file, from models/loras. An ordinary LoRA is not one.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Strength of the changes to the pretrained weights, as for a LoRA. The layers for the "
                    "detail channels are new and always count in full. Leave at 1 unless you are experimenting.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The adapted model; use it with DA-VAE latents.")],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None = None) -> bool | str:
        return comfy_bridge.check_file("loras", adapter_name)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **_: object) -> str:
        return comfy_bridge.file_stamp("loras", adapter_name)

    @classmethod
    def execute(cls, model: comfy_bridge.ModelPatcher, adapter_name: str, strength: float) -> io.NodeOutput:
        adapter = checkpoints.load_adapter(comfy_bridge.require_file("loras", adapter_name))
        return io.NodeOutput(comfy_bridge.apply_adapter(model, adapter, strength, adapter_name))


class DAVAEModelLoader(io.ComfyNode):
    """A merged DA-VAE model from models/diffusion_models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_ModelLoader",
            display_name="DA-VAE Model Loader",
            category=CATEGORY,
            description="Loads a diffusion model with the DA-VAE adapter already merged into it.",
            search_aliases=["DAVAE", "load diffusion model", "merged"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=comfy_bridge.file_names("diffusion_models"),
                    tooltip="A merged DA-VAE model, from models/diffusion_models. An ordinary SD3.5 file is not one.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="Precision of the weights. auto: what ComfyUI chooses for this machine.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The adapted model; use it with DA-VAE latents.")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return comfy_bridge.check_file("diffusion_models", model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: object) -> str:
        return comfy_bridge.file_stamp("diffusion_models", model_name)

    @classmethod
    def execute(cls, model_name: str, dtype: str) -> io.NodeOutput:
        path = comfy_bridge.require_file("diffusion_models", model_name)
        return io.NodeOutput(comfy_bridge.load_merged(path, weights_dtype(dtype)))


class TinySD35(io.ComfyNode):
    """The tiny SD3.5."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_TinySD35",
            display_name="Tiny SD3.5",
            category=CATEGORY,
            description="A very small model in the layout of SD3.5 to try the nodes with: it draws small pictures of "
            "things it knows by name, in four styles. Prompts are a style and a name, for example '3d peach' (styles: "
            "3d, flat, noto, twitter).",
            search_aliases=["DAVAE", "tiny", "demo"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The tiny model, not adapted to DA-VAE."),
                io.Clip.Output(display_name="CLIP", tooltip="Its text encoder, for CLIP Text Encode."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        return comfy_bridge.tiny_stamp()

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*comfy_bridge.load_tiny())


NODES = [DAVAELoader, DAVAEAdapter, DAVAEModelLoader, TinySD35]
