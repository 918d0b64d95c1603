"""The Adapted SD3.5 Sampler."""

from comfy_api.latest import io

from . import comfy_bridge
from .choices import require_choice
from .detail import EmptyLatent, Latent
from .loaders import CATEGORY

NO_ADAPTER = "(already adapted)"


class AdaptedSampler(io.ComfyNode):
    """Sample with an adapted SD3.5."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_Sampler",
            display_name="Adapted SD3.5 Sampler",
            category=CATEGORY,
            description="KSampler for adapted models: the same image for the same settings. Where a widget is left at "
            "0, it takes what the few-step LoRA on the MODEL recommends, or else the adapter.",
            search_aliases=["DAVAE", "KSampler", "SD3.5"],
            inputs=[
                io.Model.Input("model", tooltip="An adapted model, or an unadapted one and an adapter chosen below."),
                io.Combo.Input(
                    "adapter_name",
                    options=[NO_ADAPTER, *comfy_bridge.file_names("loras")],
                    default=NO_ADAPTER,
                    tooltip="A DA-VAE adapter file to apply to the MODEL at full strength. It is applied once and kept "
                    "with the MODEL, as a DA-VAE Adapter node does.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What it should not."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise. Same seed and settings, same image.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="Sampling steps. 0: as the few-step LoRA on the MODEL recommends, or else the adapter.",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance. 1: none. 0: as the few-step LoRA on the MODEL recommends, or else the adapter.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy_bridge.sampler_names(), default="euler", tooltip="Sampler."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy_bridge.scheduler_names(), default="simple", tooltip="Noise schedule."
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Time shift: larger spends more steps on the layout. 0: as the MODEL has it, set by "
                    "ModelSamplingSD3 or a few-step LoRA, or else as the adapter recommends.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 keeps part of the LATENT's picture.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=32,
                    max=16384,
                    step=32,
                    tooltip="Of the image, where no LATENT is connected.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=32,
                    max=16384,
                    step=32,
                    tooltip="Of the image, where no LATENT is connected.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="A DA-VAE latent to start from; its size counts, not the one above.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="For Detail Decode.")],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None = None) -> bool | str:
        return adapter_name == NO_ADAPTER or comfy_bridge.check_file("loras", adapter_name)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **_: object) -> str:
        return comfy_bridge.file_stamp("loras", adapter_name)

    @classmethod
    def execute(
        cls,
        model: comfy_bridge.ModelPatcher,
        adapter_name: str,
        positive: list,
        negative: list,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        shift: float,
        denoise: float,
        width: int,
        height: int,
        latent: Latent | None = None,
    ) -> io.NodeOutput:
        require_choice("sampler_name", sampler_name, comfy_bridge.sampler_names())
        require_choice("scheduler", scheduler, comfy_bridge.scheduler_names())
        if adapter_name != NO_ADAPTER:
            model = comfy_bridge.adapted(model, adapter_name)
        spec = comfy_bridge.latent_spec(model, ", or choose an adapter file in this node")
        if latent is None:
            latent = EmptyLatent.empty(width, height, 1, spec)
        settings = comfy_bridge.Settings(seed, steps, cfg, sampler_name, scheduler, shift, denoise)
        return io.NodeOutput(comfy_bridge.sample(model, positive, negative, latent, settings))


NODES = [AdaptedSampler]
