"""Latents that the adapted model has drawn over, and a decoder that is trained on them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints, flow, sampling, tiny
from davae_core.errors import DAVAEError
from davae_core.prompts import encode
from davae_core.sampling import Sampling
from davae_core.training.data.draws import Draws
from davae_core.training.run import state
from davae_core.training.tasks.redrawing import RedrawConfig, Redrawing
from harness.untrained import Family as Untrained

FAMILY = Untrained()
CAPTIONS = ["3d peach", "flat rocket", "flat peach", "3d rocket"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RedrawConfig:
    """Everything is drawn over."""
    folder = tmp_path_factory.mktemp("toys")
    FAMILY.write(folder)
    return RedrawConfig(
        share=1.0,
        model=folder / "diffusion_models" / FAMILY.model_file,
        adapter=folder / "loras" / FAMILY.adapter_file,
        text_encoder=folder / "text_encoders" / FAMILY.text_file,
    )


@pytest.fixture
def z() -> torch.Tensor:
    x = torch.randn(4, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    return FAMILY.latent.denormalise(x)


def redrawn(config: RedrawConfig, z: torch.Tensor, step: int = 0, **changes: Any) -> torch.Tensor:
    drawing = Redrawing.read(replace(config, **changes), FAMILY.latent)
    return drawing(z, z + 1, CAPTIONS, Draws(5, step, torch.arange(4)))


def test_it_is_what_a_sampler_makes_of_the_noised_latent(config: RedrawConfig, z: torch.Tensor) -> None:
    """From a time of 2/3, which with a shift of 2 is half way."""
    drawing = Redrawing.read(replace(config, earliest=2 / 3, latest=2 / 3, steps=3), FAMILY.latent)
    draws, spec = Draws(5, 0, torch.arange(4)), FAMILY.latent
    found = drawing(z, z + 1, CAPTIONS, draws)
    x = spec.normalise(z)
    begun = flow.add_noise(x, draws.normal("redrawn", x), torch.full((4,), 2 / 3))
    asked, empty = (encode(drawing.text, some, torch.device("cpu")) for some in (CAPTIONS, [""] * 4))
    how = Sampling(shift=2.0, cfg=FAMILY.recommended.cfg, steps=3)
    times = flow.sigmas(6, 2.0)[-4:]
    assert times[0].item() == pytest.approx(2 / 3)
    told = sampling.sample_encoded(drawing.model, asked, empty, begun, how, times=times)
    assert torch.allclose(found, spec.denormalise(told), atol=1e-4)


def test_little_noise_leaves_the_latent_and_all_of_it_makes_another(config: RedrawConfig, z: torch.Tensor) -> None:
    spec = FAMILY.latent
    away = [
        (spec.normalise(redrawn(config, z, earliest=time, latest=time)) - spec.normalise(z)).square().mean().item()
        for time in (0.001, 0.3, 1.0)
    ]
    assert away[0] < 1e-4 < away[1] < away[2]


def test_a_share_of_the_samples_is_drawn_over_and_the_others_take_the_place_of_the_rest(
    config: RedrawConfig, z: torch.Tensor
) -> None:
    kept = [
        bool(torch.equal(one, other))
        for step in range(16)
        for one, other in zip(redrawn(config, z, step, share=0.5), z + 1, strict=True)
    ]
    assert 16 < sum(kept) < 48


def decoder(stages: Any, out: Path, config: RedrawConfig, steps: int, *more: str) -> int:
    given = f"--start {stages.file('autoencoder')} --freeze-detail --redraw.share 0.5 --redraw.model {config.model}"
    given += f" --redraw.adapter {config.adapter} --redraw.text-encoder {config.text_encoder}"
    given += " --run.precision fp32 --optimiser.schedule constant"
    return stages.run("autoencoder", out, steps, *given.split(), *more)


def own(stages: Any) -> RedrawConfig:
    return RedrawConfig(0.5, stages.file("base_dit"), stages.file("adapter"), stages.file("base_dit", 1))


def test_a_decoder_is_trained_on_them_and_its_latents_stay(stages: Any, tmp_path: Path) -> None:
    assert decoder(stages, tmp_path / "whole", own(stages), 4) == 0
    assert decoder(stages, tmp_path / "cut", own(stages), 2) == 0
    assert decoder(stages, tmp_path / "cut", own(stages), 4, "--run.resume") == 0
    one, two = (state.load(tmp_path / name).tensors for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not any("mmdit" in name or "joint_blocks" in name for name in one)
    paths = (stages.file("autoencoder"), tmp_path / "cut" / tiny.AUTOENCODER)
    before, after = (checkpoints.load_autoencoder(path) for path in paths)
    assert before.latent == after.latent
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(before.encode(x), after.encode(x))
        assert not torch.equal(before.decode(before.encode(x)), after.decode(before.encode(x)))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--no-freeze-detail"], "give that DA-VAE as --start, and --freeze-detail"),
        (["--redraw.frozen", "bf16"], "give --run.precision bf16 too, or --redraw.frozen fp32"),
        (["--redraw.model", "None"], "give --redraw.model and --redraw.adapter"),
    ],
)
def test_what_cannot_be_is_refused(stages: Any, tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises(DAVAEError, match=words):
        decoder(stages, tmp_path, own(stages), 1, *more)


@pytest.mark.parametrize("changes", [{"share": 1.5}, {"earliest": 0.5, "latest": 0.4}, {"earliest": 0.0}, {"steps": 0}])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DAVAEError, match=r"redraw\.share must be from 0 to 1, 0 < redraw\.earliest <= redraw\.latest"):
        RedrawConfig(**changes)


def test_an_adapter_of_another_davae_is_refused(stages: Any, config: RedrawConfig, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"davae_toy_adapter\.safetensors is for another DA-VAE"):
        decoder(stages, tmp_path, config, 1)
