"""LoRAs for SD3.5's trunk on adapted models, by every naming that trainers write."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

RANK = 4
# Layers of the trunk: ComfyUI's name, and the name or the three names of its parts that diffusers has.
LAYERS = {
    "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "joint_blocks.0.x_block.attn2.qkv": [f"transformer_blocks.0.attn2.to_{part}" for part in "qkv"],
    "joint_blocks.0.context_block.attn.qkv": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
    "joint_blocks.1.x_block.attn.proj": ["transformer_blocks.1.attn.to_out.0"],
    "joint_blocks.1.x_block.mlp.fc1": ["transformer_blocks.1.ff.net.0.proj"],
    "joint_blocks.0.x_block.mlp.fc2": ["transformer_blocks.0.ff.net.2"],
    "joint_blocks.0.context_block.mlp.fc1": ["transformer_blocks.0.ff_context.net.0.proj"],
    "joint_blocks.1.x_block.adaLN_modulation.1": ["transformer_blocks.1.norm1.linear"],
    "context_embedder": ["context_embedder"],
}

Parts = list[tuple[torch.Tensor, torch.Tensor]]  # of a layer: (down [r, in], up [out, r]) of each


@pytest.fixture(scope="module")
def changes(toys) -> dict[str, Parts]:
    """A LoRA: what it does to each of ``LAYERS``."""
    generator = torch.Generator().manual_seed(9)
    weights = toys.family.diffusion_model().state_dict()
    made = {}
    for layer, names in LAYERS.items():
        rows, columns = weights[f"{layer}.weight"].shape
        made[layer] = [
            (
                torch.randn(RANK, columns, generator=generator),
                0.02 * torch.randn(rows // len(names), RANK, generator=generator),
            )
            for _ in names
        ]
    return made


def fused(parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of a layer as one LoRA of the whole layer."""
    return torch.cat([down for down, _ in parts]), torch.block_diag(*[up for _, up in parts])


def diffusers(prefix: str, down: str, up: str, joint: str = "."):
    """A naming with diffusers' layer names, one entry for each part."""

    def write(changes: dict[str, Parts]) -> dict[str, torch.Tensor]:
        state = {}
        for layer, parts in changes.items():
            for name, factors in zip(LAYERS[layer], parts):
                state[f"{prefix}{name.replace('.', joint)}.{down}.weight"] = factors[0]
                state[f"{prefix}{name.replace('.', joint)}.{up}.weight"] = factors[1]
        return state

    return write


def native(prefix: str, joint: str = ".", alpha: bool = False):
    """A naming with the layer names of the SD3.5 file; ``alpha``: half the up factor, an alpha of twice the rank."""

    def write(changes: dict[str, Parts]) -> dict[str, torch.Tensor]:
        state = {}
        for layer, parts in changes.items():
            name, (down, up) = prefix + layer.replace(".", joint), fused(parts)
            state[f"{name}.lora_down.weight"] = down.contiguous()
            state[f"{name}.lora_up.weight"] = up / 2 if alpha else up
            if alpha:
                state[f"{name}.alpha"] = torch.tensor(2.0 * len(down))
        return state

    return write


NAMINGS = {
    "diffusers": diffusers("transformer.", "lora_A", "lora_B"),
    "peft": diffusers("base_model.model.", "lora_A", "lora_B"),
    "OneTrainer": diffusers("lora_transformer_", "lora_down", "lora_up", joint="_"),
    "ComfyUI": native("diffusion_model."),
    "kohya": native("lora_unet_", joint="_", alpha=True),
}


def with_lora(g, model, name):
    return g.node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)


@pytest.fixture(scope="module")
def expected_model(base, toys, changes) -> str:
    """The model with the LoRA added to its weights by hand, as a file."""
    state = toys.family.diffusion_model().state_dict()
    for layer, parts in changes.items():
        down, up = fused(parts)
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + up @ down
    save_file(state, base / "models" / "diffusion_models" / "toy_with_lora.safetensors")
    return "toy_with_lora.safetensors"


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_trunk_lora_counts_in_full_before_and_after_the_adapter(
    base, comfy, run, toys, changes, expected_model, naming
):
    file = f"trunk_{naming}.safetensors"
    save_file(NAMINGS[naming](changes), base / "models" / "loras" / file)

    def build(g):
        model = toys.model(g)
        by_hand = g.node("UNETLoader", unet_name=expected_model, weight_dtype="default")
        return {
            "without": toys.ksampler(g, toys.adapter(g, model), toys.empty(g)),
            "by hand": toys.ksampler(g, toys.adapter(g, by_hand), toys.empty(g)),
            "before": toys.ksampler(g, toys.adapter(g, with_lora(g, model, file)), toys.empty(g)),
            "after": toys.ksampler(g, with_lora(g, toys.adapter(g, model), file), toys.empty(g)),
        }

    seen = len(comfy.log)
    out = {key: value["samples"] for key, value in run(build).items()}
    assert "lora key not loaded" not in "\n".join(comfy.log[seen:])
    assert (out["by hand"] - out["without"]).abs().max() > 1e-2
    for order in ("before", "after"):
        assert (out[order] - out["by hand"]).abs().max() <= 1e-4, order


def test_a_diffusers_lora_on_all_layers_loses_embedder_and_head_alone_when_put_on_after_the_adapter(
    base, comfy, run, toys, changes
):
    """Trainers that take every linear layer write these too: ``proj_out`` and ``pos_embed.proj``."""
    hidden, generator = toys.family.model.hidden, torch.Generator().manual_seed(10)
    trunk = NAMINGS["diffusers"](changes)
    shapes = {
        "transformer.proj_out": [(2, hidden), (64, 2)],
        "transformer.pos_embed.proj": [(2, 16, 2, 2), (hidden, 2, 1, 1)],
    }
    ends = {
        f"{name}.lora_{factor}.weight": 0.1 * torch.randn(shape, generator=generator)
        for name, both in shapes.items()
        for factor, shape in zip("AB", both, strict=True)
    }
    save_file(trunk, base / "models" / "loras" / "only_trunk.safetensors")
    save_file({**trunk, **ends}, base / "models" / "loras" / "all_layers.safetensors")

    def build(g):
        model = toys.model(g)
        adapted = toys.adapter(g, model)
        return {
            "trunk": toys.ksampler(g, with_lora(g, adapted, "only_trunk.safetensors"), toys.empty(g)),
            "after": toys.ksampler(g, with_lora(g, adapted, "all_layers.safetensors"), toys.empty(g)),
            "before": toys.ksampler(g, toys.adapter(g, with_lora(g, model, "all_layers.safetensors")), toys.empty(g)),
        }

    seen = len(comfy.log)
    out = {key: value["samples"] for key, value in run(build).items()}
    log = "\n".join(comfy.log[seen:])
    assert torch.equal(out["after"], out["trunk"])
    assert "final_layer.linear" in log and "x_embedder.proj" in log
    assert (out["before"] - out["trunk"]).abs().max() > 1e-2
