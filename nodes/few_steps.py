"""A few-step LoRA on an adapted model: it draws in 1 to 8 steps, without guidance."""

from comfy_api.latest import io

from ..davae_core import checkpoints
from . import comfy_bridge
from .loaders import CATEGORY


class FewStepsLora(io.ComfyNode):
    """A few-step LoRA and its settings on an adapted MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return comfy_bridge.node_schema(
            node_id="DAVAE_FewSteps",
            display_name="Few-Step LoRA",
            category=CATEGORY,
            description="Lets an adapted MODEL draw in 1 to 8 steps without guidance, with a LoRA that was trained for "
            "it. The LoRA's shift holds with every sampler; its steps and cfg are used by the Adapted SD3.5 Sampler "
            "where the widgets are 0. The MODEL you connect is not changed.",
            search_aliases=["DAVAE", "few steps", "turbo", "lightning", "fast", "distilled"],
            inputs=[
                io.Model.Input("model", tooltip="The adapted model that the LoRA was trained for."),
                io.Combo.Input(
                    "lora_name",
                    options=comfy_bridge.file_names("loras"),
                    tooltip="A few-step LoRA file, from models/loras. Adapters and other LoRAs are not such files.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Strength of the LoRA. 1: as trained. 0: the MODEL comes out as it went in, settings "
                    "included.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The adapted model for few steps; other LoRAs may be put on it, too."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return comfy_bridge.check_file("loras", lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: object) -> str:
        return comfy_bridge.file_stamp("loras", lora_name)

    @classmethod
    def execute(cls, model: comfy_bridge.ModelPatcher, lora_name: str, strength: float) -> io.NodeOutput:
        lora = checkpoints.load_few_step_lora(comfy_bridge.require_file("loras", lora_name))
        return io.NodeOutput(comfy_bridge.apply_few_steps(model, lora, strength, lora_name))


NODES = [FewStepsLora]
