"""A picture of NaN names the layer that it comes from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from davae_core.checkpoints import files

LAYER = "joint_blocks.1.x_block.mlp.fc2.bias"


def damaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * float("nan") if name == LAYER else tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def bad_files(base: Path, toys) -> None:
    """A base and a merged model with NaN deep in their trunk, where no loader looks."""
    folder = base / "models" / "diffusion_models"
    save_file(damaged(toys.family.diffusion_model().state_dict()), folder / "nan_base.safetensors")
    checkpoints.save_merged(folder / "good_merged.safetensors", toys.family.merged())
    state, told = files.read(folder / "good_merged.safetensors")
    save_file(damaged(state), folder / "nan_merged.safetensors", metadata={**told, files.HASH_KEY: ""})


def adapted(g, toys, name: str):
    if "merged" in name:
        return g.node("DAVAE_ModelLoader", model_name=name, dtype="fp32")
    model = g.node("UNETLoader", unet_name=name, weight_dtype="default")
    return toys.adapter(g, model)


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("name", ["nan_base.safetensors", "nan_merged.safetensors", "good_merged.safetensors"])
def test_nan_in_the_trunk_is_named_when_sampling_gives_nan(run, toys, caplog, name: str) -> None:
    caplog.set_level(logging.WARNING)
    out = run(lambda g: {"latent": toys.ksampler(g, adapted(g, toys, name), toys.empty(g))})
    said = [record.getMessage() for record in caplog.records if "not numbers" in record.getMessage()]
    if "nan" in name:
        assert not torch.isfinite(out["latent"]["samples"]).all()
        assert len(said) == 1 and LAYER in said[0]
    else:
        assert torch.isfinite(out["latent"]["samples"]).all() and said == []


def test_weights_that_are_finite_are_not_blamed(comfy, caplog) -> None:
    caplog.set_level(logging.WARNING)
    note_nan = comfy.pack("nodes.comfy_bridge.finite").note_nan
    note_nan(torch.nn.Linear(2, 2), torch.full((1, 2), float("inf")))
    assert "weights are all finite" in caplog.text and "--force-fp32" in caplog.text
