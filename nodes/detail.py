"""Images to DA-VAE latents and back, and ways between ordinary and DA-VAE latents."""

import logging
from typing import Any

import torch
from comfy_api.latest import io

from ..davae_core.errors import LatentError
from ..davae_core.latent import LatentSpec, with_zero_detail
from ..davae_core.sizes import crop_to_multiple, pad_to_multiple, round_up
from . import comfy_bridge, padding
from .choices import require_choice
from .loaders import CATEGORY, DAVAESocket

Latent = dict[str, Any]

FULL = "full"  # the joint decoder itself

# Latents of the DiT are cut into patches of 2 x 2, so an image needs twice the autoencoder's factor.
PATCH = 2
SIZE_RULES = ("pad", "crop")


def size_multiple(spec: LatentSpec) -> int:
    """What both sides of an image must be a multiple of: 32 px for SD3.5."""
    return spec.factor * PATCH


def latent_dict(samples: torch.Tensor, spec: LatentSpec) -> Latent:
    """A LATENT; newer ComfyUI reads the spatial factor of empty ones."""
    return {"samples": samples, "downscale_ratio_spacial": spec.factor}


def fit(image: torch.Tensor, spec: LatentSpec, rule: str, mode: str = "replicate") -> torch.Tensor:
    """``[B, H, W, c]`` brought to multiples of what the latent needs, by the rule the user chose."""
    if rule == "crop":
        return crop_to_multiple(image, size_multiple(spec))
    return pad_to_multiple(image, size_multiple(spec), mode)


def fit_mask(mask: torch.Tensor, size: tuple[int, ...], spec: LatentSpec, rule: str) -> torch.Tensor:
    """A MASK ``[B, H, W]`` of an image of ``size`` as its latent's noise mask ``[B, 1, H', W']``, 0 in the padding."""
    return fit(mask_of(size, mask)[..., None], spec, rule, "constant").movedim(-1, 1)


def mask_of(size: tuple[int, ...], mask: torch.Tensor) -> torch.Tensor:
    """The MASK as ``[B, H, W]`` of an image of ``size``, scaled to it where it is of another, as stock nodes do.

    A mask of zeros, which Load Image gives for files without an alpha channel, means that nothing is drawn.
    """
    mask = mask.reshape(-1, *mask.shape[-2:])
    height, width = mask.shape[1:]
    if not mask.any():
        logging.info("DA-VAE: the mask is empty, so nothing of the image will be made anew")
    elif height * size[1] != width * size[0]:
        logging.warning(
            "DA-VAE: the mask is %d x %d px, the image %d x %d px: it is stretched", width, height, size[1], size[0]
        )
    if (height, width) == size:
        return mask
    return torch.nn.functional.interpolate(mask[:, None], size=size, mode="bilinear")[:, 0]


def require_image(image: torch.Tensor) -> None:
    """Raise LatentError unless this is an IMAGE ``[B, H, W, 3 or more]`` with a picture in it."""
    if image.ndim != 4 or not all(image.shape):
        raise LatentError(
            f"the IMAGE has shape {list(image.shape)}, expected [batch, height, width, 3] with at least one picture: "
            "an empty batch or a video cannot be encoded"
        )
    if image.shape[-1] < 3:
        raise LatentError(f"the image has {image.shape[-1]} channels, expected red, green and blue")


def require_base_of(z_base: torch.Tensor, pixels: torch.Tensor, spec: LatentSpec) -> None:
    """Raise LatentError unless ``z_base`` can be the base of the (already fitted) image."""
    batch, height, width, _ = pixels.shape
    expected = (spec.base_channels, height // spec.factor, width // spec.factor)
    if z_base.ndim != 4 or tuple(z_base.shape[1:]) != expected or z_base.shape[0] not in (1, batch):
        raise LatentError(
            f"the base latent has shape {list(z_base.shape)}, expected {[batch, *expected]}: the ordinary latent of a "
            f"{width // spec.scale} x {height // spec.scale} px image, for the image is encoded at {width} x {height} "
            "px"
        )


class DetailEncode(io.ComfyNode):
    """Image to DA-VAE latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_DetailEncode",
            display_name="Detail Encode",
            category=CATEGORY,
            description="Encodes an image into a DA-VAE latent (base and detail channels), in strips where memory is "
            "short.",
            search_aliases=["DAVAE", "VAE encode"],
            inputs=[
                io.Image.Input("image", tooltip="Any size; see size_rule."),
                DAVAESocket.Input("davae", tooltip="From the DA-VAE Loader."),
                io.Combo.Input(
                    "size_rule",
                    options=list(SIZE_RULES),
                    default="pad",
                    tooltip="For sizes that are no multiple of 32. pad: continue the image equally on both sides; "
                    "Detail Decode cuts that off again. crop: cut equally from both sides.",
                ),
                io.Latent.Input(
                    "base_latent",
                    optional=True,
                    tooltip="An ordinary latent of the same image at half the size, to use as the base instead of "
                    "encoding it here (for example of an image you edited at half size).",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="For inpainting: white is painted anew. Scaled to the image, padded or cropped with it, "
                    "so that it stays in place, which Set Latent Noise Mask cannot do.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The DA-VAE latent."),
                io.Latent.Output(
                    display_name="base LATENT", tooltip="Its base: the ordinary latent of the half-size image."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        davae: comfy_bridge.AutoencoderHandle,
        size_rule: str,
        base_latent: Latent | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        require_image(image)
        require_choice("size_rule", size_rule, SIZE_RULES)
        spec, size = davae.latent, (image.shape[1], image.shape[2])
        pixels = fit(image[..., :3], spec, size_rule)
        z_base = None if base_latent is None else base_latent["samples"]
        if z_base is not None:
            require_base_of(z_base, pixels, spec)
        samples = davae.encode(pixels, z_base)
        latent = latent_dict(samples, spec)
        if size_rule == "pad":
            latent = padding.padded_latent(latent, size, size_multiple(spec))
        if mask is not None:
            latent["noise_mask"] = fit_mask(mask, size, spec, size_rule)
        base = {"samples": samples[:, : spec.base_channels].clone()}
        return io.NodeOutput(latent, base)


class DetailDecode(io.ComfyNode):
    """DA-VAE latent to image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_DetailDecode",
            display_name="Detail Decode",
            category=CATEGORY,
            description="Decodes a DA-VAE latent into an image, in strips where memory is short (the same image, no "
            "seams).",
            search_aliases=["DAVAE", "VAE decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="A DA-VAE latent."),
                DAVAESocket.Input("davae", tooltip="From the DA-VAE Loader."),
                io.Float.Input(
                    "detail_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="0: the base alone. 1: as trained. Above 1: exaggerated detail.",
                ),
                io.Combo.Input(
                    "decoder",
                    options=[FULL, *comfy_bridge.decoder_names()],
                    default=FULL,
                    optional=True,
                    tooltip="full: the DA-VAE's own decoder. Else a tiny decoder of it, from models/vae_approx: nearly "
                    "the same image, in a small part of the time.",
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
        )

    @classmethod
    def validate_inputs(cls, decoder: str | None = FULL) -> bool | str:
        return decoder == FULL or comfy_bridge.check_file(comfy_bridge.DECODERS, decoder)

    @classmethod
    def fingerprint_inputs(cls, decoder: str | None = FULL, **_: object) -> str:
        return FULL if decoder == FULL else comfy_bridge.file_stamp(comfy_bridge.DECODERS, decoder)

    @classmethod
    def execute(
        cls, samples: Latent, davae: comfy_bridge.AutoencoderHandle, detail_strength: float, decoder: str = FULL
    ) -> io.NodeOutput:
        z, spec = samples["samples"], davae.latent
        require_davae_latent(z, spec)
        if decoder == FULL:
            image = davae.decode(z, detail_strength)
        else:
            image = comfy_bridge.decode_fast(decoder, davae, z, detail_strength)
        return io.NodeOutput(padding.picture_box(samples, spec).cut(image))


class EmptyLatent(io.ComfyNode):
    """An empty DA-VAE latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_EmptyLatent",
            display_name="Empty DA-VAE Latent",
            category=CATEGORY,
            description="An empty latent to sample an image from nothing. Sizes are rounded up to the next multiple "
            "of 32. The stock Empty Latent nodes make latents of another factor.",
            search_aliases=["DAVAE", "empty latent", "EmptySD3LatentImage"],
            inputs=[
                io.Int.Input("width", default=1024, min=32, max=16384, step=32, tooltip="Of the image, in pixels."),
                io.Int.Input("height", default=1024, min=32, max=16384, step=32, tooltip="Of the image, in pixels."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many images."),
                DAVAESocket.Input(
                    "davae",
                    optional=True,
                    tooltip="Needed only for a DA-VAE of another shape than SD3.5's (16 + 16, 1/16).",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT")],
        )

    @classmethod
    def execute(
        cls, width: int, height: int, batch_size: int, davae: comfy_bridge.AutoencoderHandle | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(cls.empty(width, height, batch_size, davae.latent if davae else LatentSpec()))

    @staticmethod
    def empty(width: int, height: int, batch_size: int, spec: LatentSpec) -> Latent:
        """A LATENT of zeros for images of at least ``width x height`` pixels."""
        rows, columns = (round_up(side, size_multiple(spec)) // spec.factor for side in (height, width))
        return latent_dict(comfy_bridge.empty(batch_size, spec.channels, rows, columns), spec)


class FromBaseLatent(io.ComfyNode):
    """Ordinary SD3 latent to DA-VAE latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_FromBaseLatent",
            display_name="Base to DA-VAE Latent",
            category=CATEGORY,
            description="Makes an ordinary SD3.5 latent the base of an image twice its size, with no detail yet. "
            "Sample it with denoise below 1 to add the detail.",
            search_aliases=["DAVAE", "upscale latent"],
            inputs=[
                io.Latent.Input("samples", tooltip="An ordinary SD3 / SD3.5 latent (16 channels)."),
                DAVAESocket.Input(
                    "davae", optional=True, tooltip="Needed only for a DA-VAE of another shape than SD3.5's."
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT")],
        )

    @classmethod
    def execute(cls, samples: Latent, davae: comfy_bridge.AutoencoderHandle | None = None) -> io.NodeOutput:
        spec = davae.latent if davae else LatentSpec()
        rest = {key: value for key, value in samples.items() if key != padding.KEY}
        return io.NodeOutput({**rest, **latent_dict(with_zero_detail(samples["samples"], spec), spec)})


class ToBaseLatent(io.ComfyNode):
    """DA-VAE latent to ordinary SD3 latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_ToBaseLatent",
            display_name="DA-VAE to Base Latent",
            category=CATEGORY,
            description="Takes the base channels of a DA-VAE latent: the ordinary SD3.5 latent of the half-size image.",
            search_aliases=["DAVAE", "base latent"],
            inputs=[
                io.Latent.Input("samples", tooltip="A DA-VAE latent."),
                DAVAESocket.Input(
                    "davae", optional=True, tooltip="Needed only for a DA-VAE of another shape than SD3.5's."
                ),
            ],
            outputs=[io.Latent.Output(display_name="base LATENT", tooltip="For the base VAE or the unadapted model.")],
        )

    @classmethod
    def execute(cls, samples: Latent, davae: comfy_bridge.AutoencoderHandle | None = None) -> io.NodeOutput:
        spec = davae.latent if davae else LatentSpec()
        z = samples["samples"]
        require_davae_latent(z, spec)
        rest = {key: value for key, value in samples.items() if key not in (padding.KEY, "downscale_ratio_spacial")}
        return io.NodeOutput({**rest, "samples": z[:, : spec.base_channels].clone()})


def require_davae_latent(z: torch.Tensor, spec: LatentSpec) -> None:
    """Raise LatentError, in the words of the graph, unless ``z`` is a DA-VAE latent."""
    if z.ndim == 4 and z.shape[1] == spec.base_channels:
        raise LatentError(
            f"the LATENT has {z.shape[1]} channels: it is an ordinary latent, expected a DA-VAE latent of "
            f"{spec.channels} ({spec.base_channels} base + {spec.detail_channels} detail). Decode it with its own VAE, "
            "or turn it into one with Base to DA-VAE Latent"
        )
    spec.check(z, "the LATENT")


NODES = [DetailEncode, DetailDecode, EmptyLatent, FromBaseLatent, ToBaseLatent]
