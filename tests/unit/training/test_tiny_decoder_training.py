"""The tiny decoder's stage: what it learns, what it leaves, and that only the tiny decoder is trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from davae_core import checkpoints, tiny
from davae_core.checkpoints import files, metadata
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.errors import DAVAEError
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.tiny_decoder import TinyDecoder, TinyDecoderConfig
from davae_core.training import stages as entry
from davae_core.training.objective import Reconstruction
from davae_core.training.run import state
from davae_core.training.tasks.tiny_decoder import TinyDecoderPhase


def run(stages: Any, out: Path, steps: int, *more: str) -> int:
    """Train on the toy pictures, in this process."""
    common = f"micro --data.images {stages.images} --data.size 32 --run.out {out} --run.steps {steps} --run.batch 4"
    common += " --run.log-every 1 --run.sample-every 0 --optimiser.warmup 0 --optimiser.ema 0 --losses.perceptual 0"
    given = f"--widths 8 8 8 8 8 --autoencoder {stages.file('autoencoder')} --run.precision fp32"
    return entry.run("tiny_decoder", [*common.split(), *given.split(), *more])


def test_it_learns_the_joint_decoders_pictures(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path, 60, "--optimiser.lr", "5e-3") == 0
    losses = stages.curves(tmp_path)["tiny_decoder/l2"]
    assert losses[60] < 0.5 * losses[1]
    decoder = checkpoints.load_tiny_decoder(tmp_path / tiny.DECODER)
    davae = checkpoints.load_autoencoder(stages.file("autoencoder"), torch.float32)
    assert decoder.latent == davae.latent and decoder.config.widths == (8,) * 5
    assert decoder.decode(torch.randn(1, 32, 2, 2)).shape == (1, 3, 32, 32)


class Joint(torch.nn.Module):
    """The joint decoder in the tiny one's place; remembers what it was given."""

    def __init__(self, davae: DAVAE) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self._davae = (davae,)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        (davae,) = self._davae
        self.seen.append(z)
        return davae.decode(davae.latent.denormalise(z)).clamp(-1, 1)


def phase_of(stages: Any, **changes: Any) -> tuple[TinyDecoderPhase, Joint]:
    """The phase with these settings, around the joint decoder itself."""
    davae = checkpoints.load_autoencoder(stages.file("autoencoder"), torch.float32)
    recipe = replace(entry.STAGES["tiny_decoder"].recipes["micro"][1], **changes)
    joint, loss = Joint(davae), Reconstruction(replace(recipe.losses, perceptual=0.0))
    return TinyDecoderPhase(joint, davae, recipe, loss), joint  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [False, True])
def test_a_weakened_detail_is_to_be_seen(stages: Any, keep: bool) -> None:
    """The picture to learn is the joint decoder's of the same latent, and there are latents at many strengths."""
    phase, joint = phase_of(stages, latent_noise=0.0, detail_faded=0.5, keep_latents=keep)
    batch = {"image": torch.rand(8, 3, 32, 32) * 2 - 1, "position": torch.arange(8)}
    for step in range(2):
        assert phase(batch, step)["l1"] < 1e-5
    whole = phase.latents(batch["image"])
    units = joint._davae[0].latent
    for z in joint.seen:
        ratio = units.denormalise(z)[:, 16:].flatten(1).norm(dim=1) / whole[:, 16:].flatten(1).norm(dim=1)
        assert 0 < (ratio < 0.999).sum() < 8 and ratio.max() < 1.001
        assert torch.allclose(units.denormalise(z)[:, :16], whole[:, :16], atol=1e-4)
    assert not torch.allclose(*joint.seen)


def test_a_noised_latent_is_to_give_the_picture_without_noise(stages: Any) -> None:
    phase, joint = phase_of(stages, latent_noise=0.5, detail_faded=0.0)
    batch = {"image": torch.rand(8, 3, 32, 32) * 2 - 1, "position": torch.arange(8)}
    with torch.no_grad():
        error = phase(batch, 3)["l1"].item()
    clean = joint._davae[0].latent.normalise(phase.latents(batch["image"]))
    (z,) = joint.seen
    levels = (z - clean).std((1, 2, 3))
    assert len(set(levels.tolist())) == 8 and levels.max() < 0.6
    pictures = phase.decode(phase.latents(batch["image"]))
    assert error == pytest.approx((pictures - joint(z)).abs().mean().item(), abs=1e-5) and error > 1e-3


def test_the_perceptual_distance_counts_from_its_step_on(stages: Any) -> None:
    phase, _ = phase_of(stages, perceptual_start=5)
    phase.loss.config = replace(phase.loss.config, l1=100.0)  # stands for what differs between the two
    batch = {"image": torch.rand(2, 3, 32, 32) * 2 - 1, "position": torch.arange(2)}
    before, after = (phase(batch, step) for step in (4, 5))
    assert before["loss"] < 10 * before["l1"] and after["loss"] > 90 * after["l1"] > 0


@pytest.mark.parametrize("size", [1024, 2048])
def test_a_preview_takes_two_percent_of_a_step_at_full_size(size: int) -> None:
    """Of the arithmetic of a guided step of SD3.5-medium; and of a decode much less than a tenth."""
    widths = entry.STAGES["tiny_decoder"].recipes["sd3_tiny_decoder"][1].widths
    flops = []
    with torch.device("meta"), torch.no_grad():
        model = MMDiT(MMDiTConfig(in_channels=32, out_channels=32))
        davae, decoder = DAVAE(DAVAEConfig()), TinyDecoder(TinyDecoderConfig(LatentSpec(), widths))
        z = torch.empty(1, 32, size // 16, size // 16)
        text = torch.empty(1), torch.empty(1, 333, 4096), torch.empty(1, 2048)
        for work in (lambda: model(z, *text), lambda: davae.decode(z), lambda: decoder(z)):
            with FlopCounterMode(display=False) as counter:
                work()
            flops.append(counter.get_total_flops())
    prediction, decode, preview = flops
    assert 0.01 < preview / (2 * prediction) < 0.02 and preview / decode < 0.02


def test_a_file_tells_which_davae_it_is_for(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path, 1) == 0
    history = metadata.history_of(files.read_metadata(tmp_path / tiny.DECODER)[1], tiny.DECODER)
    assert history is not None and history.of["davae"].name == tiny.AUTOENCODER and history.of["davae"].values


def test_nothing_but_the_tiny_decoder_is_trained(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path, 2) == 0
    names = {name.split("/")[-1] for name in state.load(tmp_path).tensors}
    layers = {f"model.{name}" for name in checkpoints.load_tiny_decoder(tmp_path / tiny.DECODER).state_dict()}
    assert layers <= names and not any("joint" in name or "encoder." in name for name in names)


def test_a_resumed_run_is_the_run(stages: Any, tmp_path: Path) -> None:
    constant = ("--optimiser.schedule", "constant")
    assert run(stages, tmp_path / "cut", 2, *constant) == 0
    assert run(stages, tmp_path / "whole", 4, *constant) == 0
    assert run(stages, tmp_path / "cut", 4, *constant, "--run.resume") == 0
    one, two = (state.load(tmp_path / name).tensors for name in ("whole", "cut"))
    assert one and all(torch.equal(one[name], two[name]) for name in one)


def test_it_goes_on_from_a_tiny_decoder(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path / "first", 2) == 0
    start = tmp_path / "first" / tiny.DECODER
    assert run(stages, tmp_path / "more", 1, "--start", str(start), "--optimiser.lr", "0") == 0
    one, two = (checkpoints.load_tiny_decoder(p) for p in (start, tmp_path / "more" / tiny.DECODER))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor)
    with pytest.raises(DAVAEError, match=r"--start.*widths \(8, 8, 8, 8, 8\).*--widths"):
        run(stages, tmp_path / "wide", 1, "--start", str(start), "--widths", "9", "8", "8", "8", "8")


def test_it_is_measured_against_the_joint_decoder(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path, 1, "--data.held-out", "25%") == 0
    lines = (tmp_path / "validation.jsonl").read_text("utf-8").splitlines()
    told = json.loads(lines[-1])
    assert told["to_joint/psnr"] > 0 and told["time_of_joint"] > 0
