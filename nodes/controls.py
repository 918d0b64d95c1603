"""What a separate base and detail let you do: sample the detail again, put another base under it."""

import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..davae_core.latent import LatentSpec, with_base
from . import comfy_bridge
from .detail import Latent, mask_of, require_davae_latent
from .loaders import CATEGORY, DAVAESocket
from .padding import picture_box


class RerollDetail(io.ComfyNode):
    """Sample the detail of a DA-VAE latent anew."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_RerollDetail",
            display_name="Re-roll Detail",
            category=CATEGORY,
            description="Keeps the base of a finished DA-VAE latent and lets the next sampler make its detail anew: "
            "the same picture with other detail. Connect both outputs to one sampler.",
            search_aliases=["DAVAE", "reroll", "detail seed", "variation"],
            inputs=[
                io.Model.Input("model", tooltip="The adapted model. It is not changed."),
                io.Latent.Input(
                    "samples",
                    tooltip="A DA-VAE latent with a picture in it. If it has a noise mask, detail is sampled only "
                    "where that is white.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White: detail is sampled anew. Black: it is kept, too. Scaled to the decoded image; "
                    "takes the place of the LATENT's noise mask.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="Samples the detail channels alone. For the sampler that gets LATENT."
                ),
                io.Latent.Output(display_name="LATENT", tooltip="The latent with its mask. For the same sampler."),
            ],
        )

    @classmethod
    def execute(
        cls, model: comfy_bridge.ModelPatcher, samples: Latent, mask: torch.Tensor | None = None
    ) -> io.NodeOutput:
        spec, z = comfy_bridge.latent_spec(model), samples["samples"]
        comfy_bridge.require_channels(spec, tuple(z.shape))
        latent = samples.copy()
        latent.setdefault("noise_mask", torch.ones(1, 1, *z.shape[2:]))
        if mask is not None:
            latent["noise_mask"] = noise_mask(mask, samples, spec)
        return io.NodeOutput(comfy_bridge.keep_base(model), latent)


def noise_mask(mask: torch.Tensor, samples: Latent, spec: LatentSpec) -> torch.Tensor:
    """A MASK of the decoded image as noise mask ``[B, 1, f s h, f s w]``, 0 in the padding that decoding cuts off."""
    box = picture_box(samples, spec)
    mask = mask_of((box.height, box.width), mask)
    height, width = (side * spec.factor for side in samples["samples"].shape[2:])
    edges = (box.left, width - box.left - box.width, box.top, height - box.top - box.height)
    return F.pad(mask[:, None], edges)


class SwapBase(io.ComfyNode):
    """Another base under the detail of a DA-VAE latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_SwapBase",
            display_name="Swap Base",
            category=CATEGORY,
            description="Puts an ordinary SD3.5 latent under the detail of a DA-VAE latent, in place of its base.",
            search_aliases=["DAVAE", "base latent", "replace base"],
            inputs=[
                io.Latent.Input("samples", tooltip="A DA-VAE latent; its detail is kept."),
                io.Latent.Input(
                    "base_latent",
                    tooltip="The new base: an ordinary SD3 / SD3.5 latent (16 channels) of the same width and height "
                    "in latent pixels, so of an image of half the size. One for all images, or one for each.",
                ),
                DAVAESocket.Input(
                    "davae", optional=True, tooltip="Needed only for a DA-VAE of another shape than SD3.5's."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The DA-VAE latent with the new base and old detail.")
            ],
        )

    @classmethod
    def execute(
        cls, samples: Latent, base_latent: Latent, davae: comfy_bridge.AutoencoderHandle | None = None
    ) -> io.NodeOutput:
        spec, z = davae.latent if davae else LatentSpec(), samples["samples"]
        require_davae_latent(z, spec)
        latent = samples.copy()
        latent["samples"] = with_base(z, base_latent["samples"], spec)
        return io.NodeOutput(latent)


NODES = [RerollDetail, SwapBase]
