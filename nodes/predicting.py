"""The detail of an ordinary latent, predicted: a picture of twice the size with no adapter and no sampling."""

import torch
from comfy_api.latest import io

from ..davae_core.errors import LatentError
from ..davae_core.latent import LatentSpec
from . import comfy_bridge, padding
from .detail import Latent, latent_dict
from .loaders import CATEGORY, DAVAESocket

KIND = comfy_bridge.PREDICTORS


class PredictDetail(io.ComfyNode):
    """Ordinary latent to DA-VAE latent with its likely detail."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_PredictDetail",
            display_name="Predict Detail",
            category=CATEGORY,
            description="Makes an ordinary latent the base of an image twice its size, with the detail that it lets "
            "one expect: one pass of a small network, no adapter, no sampling. Detail Decode then gives the image.",
            search_aliases=["DAVAE", "upscale latent", "latent upscaler", "2x decode"],
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip="An ordinary latent of the DA-VAE's base VAE, whatever model drew it.",
                ),
                DAVAESocket.Input("davae", tooltip="From the DA-VAE Loader."),
                io.Combo.Input(
                    "predictor_name",
                    options=comfy_bridge.file_names(KIND),
                    tooltip="A detail predictor file that was trained with this DA-VAE, from "
                    "models/latent_upscale_models. Latent upscalers of other kinds are not such files.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The DA-VAE latent: for Detail Decode or a sampler.")
            ],
        )

    @classmethod
    def validate_inputs(cls, predictor_name: str | None = None) -> bool | str:
        return comfy_bridge.check_file(KIND, predictor_name)

    @classmethod
    def fingerprint_inputs(cls, predictor_name: str | None, **_: object) -> str:
        return comfy_bridge.file_stamp(KIND, predictor_name)

    @classmethod
    def execute(cls, samples: Latent, davae: comfy_bridge.AutoencoderHandle, predictor_name: str) -> io.NodeOutput:
        z, spec = samples["samples"], davae.latent
        require_ordinary_latent(z, spec)
        rest = {key: value for key, value in samples.items() if key != padding.KEY}
        return io.NodeOutput({**rest, **latent_dict(comfy_bridge.predict_detail(davae, predictor_name, z), spec)})


def require_ordinary_latent(z: torch.Tensor, spec: LatentSpec) -> None:
    """Raise LatentError, in the words of the graph, where ``z`` has detail already."""
    if z.ndim == 4 and z.shape[1] == spec.channels:
        raise LatentError(
            f"the LATENT has {z.shape[1]} channels: it is a DA-VAE latent and has its detail, expected an ordinary one "
            f"of {spec.base_channels}. Leave this node out, or take its base with DA-VAE to Base Latent"
        )


NODES = [PredictDetail]
