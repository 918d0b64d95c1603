"""The base models that a DA-VAE can stand on: all that is particular to each of them, in one table.

A base is a VAE in the LDM layout (:mod:`davae_core.autoencoder`), the units its diffusion model sees latents in, and,
where adapters can be made for it, the names of what an adapter changes in that diffusion model. Another base is another
entry of :data:`BASES`; an adapter for another kind of diffusion model also takes that model's own modules.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .autoencoder import AutoencoderConfig
from .errors import DAVAEError

BASE_KEY = "davae.base"  # in the metadata of a VAE's file: a key of BASES, or OWN_UNITS with shift and scale
OWN_UNITS = "units:"  # before "SHIFT,SCALE": the name of a base that is none of BASES and states its units
ARCHITECTURE_KEY = "modelspec.architecture"


@dataclass(frozen=True)
class DiffusionLayout:
    """Names in a diffusion model's checkpoint, and in LoRA files for it.

    Attributes:
        embedder, head: where the names of the patch embedder's and the head's tensors start.
        block: where those of block ``{}`` start.
        lora_block: the same in a LoRA file (diffusers' names).
        lora_modules: LoRA module to (weight within the block, which third of a fused projection or None).
        lora_targets: the modules that the paper puts LoRA on.
        not_in_the_last_block: the modules that the last block lacks.
        mark: a tensor that only a model of this kind has.
    """

    embedder: str
    head: str
    block: str
    lora_block: str
    lora_modules: Mapping[str, tuple[str, int | None]] = field(hash=False)
    lora_targets: tuple[str, ...]
    not_in_the_last_block: tuple[str, ...]
    mark: str


@dataclass(frozen=True)
class Base:
    """A base model's VAE and what is known of the diffusion model on it.

    Attributes:
        name: key of :data:`BASES`.
        title: for people.
        latent_channels, factor, quant_conv: of the VAE; what it is told by.
        normalisation: (shift, scale): the diffusion model sees ``(z - shift) * scale``. None where that is measured
            per channel and not published with the model.
        architectures: how ``modelspec.architecture`` begins in the metadata of the family's files.
        file_names: a regular expression found in the names of the family's files, in lower case and without the
            ending; "" where names tell nothing.
        comfyui_latents: the class of ``comfy.latent_formats`` that knows the preview colours, or "".
        diffusion: of the diffusion model that adapters are for; None where there are none.
        by_shape: a VAE of these shapes is taken for this base's where nothing else is told. Only of the rows that had
            their shapes to themselves when they were added: a later one of the same shapes has to be named, so that
            files which do not tell keep their units.
    """

    name: str
    title: str
    latent_channels: int
    factor: int
    quant_conv: bool
    normalisation: tuple[float, float] | None
    architectures: tuple[str, ...] = ()
    file_names: str = ""
    comfyui_latents: str = ""
    diffusion: DiffusionLayout | None = None
    by_shape: bool = False

    def fits(self, config: AutoencoderConfig) -> bool:
        """Whether a VAE has this base's channels, factor and convolutions; the widths are its own affair."""
        given = (config.latent_channels, config.factor, config.quant_conv)
        return given == (self.latent_channels, self.factor, self.quant_conv)


# Source: the SD3.5 checkpoints, and diffusers' SD3 transformer for the LoRA names.
MMDIT = DiffusionLayout(
    embedder="x_embedder.proj.",
    head="final_layer.linear.",
    block="joint_blocks.{}.",
    lora_block="transformer.transformer_blocks.{}.",
    lora_modules={
        **{f"attn.to_{name}": ("x_block.attn.qkv", i) for i, name in enumerate("qkv")},
        "attn.to_out.0": ("x_block.attn.proj", None),
        **{f"attn2.to_{name}": ("x_block.attn2.qkv", i) for i, name in enumerate("qkv")},
        "attn2.to_out.0": ("x_block.attn2.proj", None),
        **{f"attn.add_{name}_proj": ("context_block.attn.qkv", i) for i, name in enumerate("qkv")},
        "attn.to_add_out": ("context_block.attn.proj", None),
        "ff.net.0.proj": ("x_block.mlp.fc1", None),
        "ff.net.2": ("x_block.mlp.fc2", None),
        "ff_context.net.0.proj": ("context_block.mlp.fc1", None),
        "ff_context.net.2": ("context_block.mlp.fc2", None),
        "norm1.linear": ("x_block.adaLN_modulation.1", None),
    },
    lora_targets=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2", "norm1.linear"),
    # The last block's text tokens are read by nobody, so it has no layers after its attention for them.
    not_in_the_last_block=("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"),
    mark="joint_blocks.0.x_block.attn.qkv.weight",
)

SD3_SHIFT, SD3_SCALE = 0.0609, 1.5305

# Source of the units: the configurations of the releases (``scale_factor`` of SD1 and SDXL, shift and scale of SD3 and
# FLUX.1, whose VAE has SD3's shapes).
# VA-VAE (arXiv 2501.01423) is used with the statistics of each of its 32 channels, which are not in its publication.
SD1 = Base(
    "sd1",
    "SD1 / SD2",
    4,
    8,
    True,
    (0.0, 0.18215),
    ("stable-diffusion-v1", "stable-diffusion-v2"),
    comfyui_latents="SD15",
    by_shape=True,
)
SDXL = Base("sdxl", "SDXL", 4, 8, True, (0.0, 0.13025), ("stable-diffusion-xl",), comfyui_latents="SDXL", by_shape=True)
SD3 = Base(
    "sd3",
    "SD3 / SD3.5",
    16,
    8,
    False,
    (SD3_SHIFT, SD3_SCALE),
    ("stable-diffusion-v3",),
    r"(?<![a-z])sd[ _-]?3|stable[ _-]?diffusion[ _-]?3",
    "SD3",
    MMDIT,
    by_shape=True,
)
VAVAE = Base("vavae", "VA-VAE", 32, 16, True, None, by_shape=True)
# ae.safetensors is what the VAE is called in the releases of FLUX.1 and of the models that took it over, in the same
# units: Z-Image, Lumina 2, Chroma, HiDream-I1.
FLUX1 = Base(
    "flux1",
    "FLUX.1",
    16,
    8,
    False,
    (0.1159, 0.3611),
    ("flux-1", "flux.1", "flux1", "chroma", "lumina-2", "lumina2", "z-image", "hidream"),
    r"^ae$|(?<![a-z])(flux|chroma|lumina|z[ _-]?image|hidream)",
    "Flux",
)

BASES = {base.name: base for base in (SD1, SDXL, SD3, VAVAE, FLUX1)}


def base_of(config: AutoencoderConfig, name: str = "", metadata: Mapping[str, str] | None = None) -> Base:
    """Which base a VAE belongs to: the one that is named, else the one its file's metadata names, else by its shapes.

    Args:
        config: the VAE's shapes.
        name: key of :data:`BASES`; "" leaves it to the file.
        metadata: of the VAE's file: ``davae.base`` (a key, or :data:`OWN_UNITS`), or else ``modelspec.architecture``.

    Returns:
        The base; one of no name, whose units have to be measured, for a VAE whose shapes are none of the table's; one
        that is named by its units where those are all that is stated of it.

    Raises:
        DAVAEError: nothing is named and the shapes fit several bases (SD1 and SDXL), or what is named does not fit.
    """
    if named := name or base_named(metadata or {}):
        if units := _own_units(named):
            shape = config.latent_channels, config.factor, config.quant_conv
            return Base(named, "an unknown model", *shape, units)
        if named not in BASES:
            raise DAVAEError(f"there is no base model {named!r}, expected one of {', '.join(BASES)}")
        if not BASES[named].fits(config):
            raise DAVAEError(
                f"the VAE is not that of {BASES[named].title}: {_shape(BASES[named])}, got {_shape(config)}"
            )
        return BASES[named]
    fitting = [base for base in BASES.values() if base.by_shape and base.fits(config)]
    if len(fitting) > 1:
        names = " or ".join(base.name for base in fitting)
        raise DAVAEError(
            f"the VAE ({_shape(config)}) can be that of {' or of '.join(base.title for base in fitting)}: the same "
            f"shapes, but other units. Say which it is, with `family` set to {names}, or with {BASE_KEY!r} in the "
            "metadata of its file"
        )
    if fitting:
        return fitting[0]
    return Base("", "an unknown model", config.latent_channels, config.factor, config.quant_conv, None)


def base_of_latent(channels: int, factor: int, normalisation: tuple[object, object]) -> Base | None:
    """The base whose latents have these channels, this factor and these units, or None."""
    given = (channels, factor, normalisation)
    return next((b for b in BASES.values() if (b.latent_channels, b.factor, b.normalisation) == given), None)


def normalisation_by_shape(config: AutoencoderConfig) -> tuple[float, float]:
    """(shift, scale) of the one base that the shapes fit; (0, 1), which is none, where they leave it open."""
    known = [
        base.normalisation for base in BASES.values() if base.by_shape and base.fits(config) and base.normalisation
    ]
    return known[0] if len(known) == 1 else (0.0, 1.0)


def of_units(channels: int, shift: object, scale: object) -> Base | None:
    """The base of this many latent channels whose configuration has this shift and scale, or None."""
    return next((b for b in BASES.values() if (b.latent_channels, b.normalisation) == (channels, (shift, scale))), None)


def name_of_units(channels: int, shift: float, scale: float) -> str:
    """What :func:`base_of` knows a VAE's stated units by: a key of :data:`BASES`, or :data:`OWN_UNITS` with them."""
    known = of_units(channels, shift, scale)
    return known.name if known else f"{OWN_UNITS}{shift},{scale}"


def _own_units(name: str) -> tuple[float, float] | None:
    """The shift and scale that a name written by :func:`name_of_units` holds; None for any other name."""
    if not name.startswith(OWN_UNITS):
        return None
    try:
        shift, scale = map(float, name.removeprefix(OWN_UNITS).split(","))
    except ValueError:
        return None
    return (shift, scale) if math.isfinite(shift) and 0 < scale < math.inf else None


def base_named(metadata: Mapping[str, str]) -> str:
    """The base that a file's metadata names, or ""."""
    if BASE_KEY in metadata:
        return metadata[BASE_KEY]
    architecture = metadata.get(ARCHITECTURE_KEY, "").lower()
    return next((base.name for base in BASES.values() if architecture.startswith(base.architectures)), "")


def base_by_file_name(config: AutoencoderConfig, file: str) -> str:
    """The base that the name of a VAE's file tells, among those that its shapes fit, or "" where it tells none or two.

    Args:
        config: the VAE's shapes.
        file: the name with or without its ending, such as ``flux_vae.safetensors`` or ``ae.sft``.
    """
    stem = file.lower().removesuffix(".safetensors").removesuffix(".sft")
    told = [b.name for b in BASES.values() if b.file_names and b.fits(config) and re.search(b.file_names, stem)]
    return told[0] if len(told) == 1 else ""


def _shape(vae: Base | AutoencoderConfig) -> str:
    quant = "with" if vae.quant_conv else "without"
    return f"{vae.latent_channels} channels at 1/{vae.factor}, {quant} quant_conv"
