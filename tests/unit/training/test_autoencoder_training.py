"""Stage 1 and its base: what is frozen, what is trained, and what the exported files hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints
from davae_core.autoencoder import Autoencoder, AutoencoderConfig, Encoder
from davae_core.bases import SD3_SCALE
from davae_core.checkpoints import files
from davae_core.errors import DAVAEError
from davae_core.training import objective
from davae_core.training.data import dataset
from davae_core.training.pretrained import base_vae as load
from davae_core.training.recipes.tiny import AUTOENCODER, BASE_AUTOENCODER
from davae_core.training.run import launch, state
from davae_core.training.run.config import from_command_line
from davae_core.training.tasks.autoencoder import gradient_ratio, on_base
from davae_core.training.tasks.base_autoencoder import scaled

TOY = AutoencoderConfig(widths=(32, 32, 32, 64), blocks=1)
Tensors = dict[str, torch.Tensor]


def rebuilt(tensors: Tensors) -> Autoencoder:
    model = Autoencoder(TOY)
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize(("factor", "tolerance"), [(2.0, 0.0), (0.25, 0.0), (0.37, 1e-5)])
@torch.no_grad()
def test_scaling_folds_into_the_weights(factor: float, tolerance: float) -> None:
    model = Autoencoder(TOY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = rebuilt(scaled(model.state_dict(), factor))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, logvar = model.encoder(x).chunk(2, dim=1)
    other_mean, other_logvar = other.encoder(x).chunk(2, dim=1)
    assert torch.allclose(other_mean, factor * mean, rtol=tolerance, atol=tolerance)
    std, other_std = (logvar / 2).exp(), (other_logvar / 2).exp()
    assert torch.allclose(other_std, factor * std, rtol=1e-5)
    assert torch.allclose(other.decode(factor * mean), model.decode(mean), rtol=tolerance, atol=tolerance)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def survey(recipe: Any, multiple: int) -> list[torch.Tensor]:
    """The images that statistics are measured on."""
    loader = dataset.loader(
        recipe.data, batch=launch.SURVEY_BATCH, seed=recipe.run.seed, multiple=multiple, steps=launch.SURVEY_STEPS
    )
    return [batch["image"] for batch in loader]


@torch.no_grad()
def test_the_exported_base_latent_has_the_spread_that_sd3_expects(stages: Any) -> None:
    command = stages.command("base_autoencoder", stages.folder("base_autoencoder"), 2)
    recipe = from_command_line(BASE_AUTOENCODER, "", command)
    model = load(stages.file("base_autoencoder"))
    _, std = objective.statistics(model.encode(x) for x in survey(recipe, 8))
    assert float(std.square().mean().sqrt()) * SD3_SCALE == pytest.approx(1, rel=1e-4)


@torch.no_grad()
def test_the_exported_base_reconstructs_as_the_trained_one(stages: Any) -> None:
    saved = state.part(state.load(stages.folder("base_autoencoder")).tensors, "autoencoder/average/model.")
    trained, exported = rebuilt(saved), load(stages.file("base_autoencoder"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(trained.decode(trained.encode(x)), exported.decode(exported.encode(x)), atol=1e-5)


def test_statistics_are_those_of_all_latents_together() -> None:
    parts = [torch.randn(3, 4, 2, 2) * 2 + 1, torch.randn(1, 4, 2, 2), torch.randn(2, 4, 6, 2) - 5]
    mean, std = objective.statistics(parts)
    values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
    assert torch.allclose(mean, values.mean(dim=1), atol=1e-5)
    assert torch.allclose(std, values.std(dim=1, correction=0), atol=1e-5)


def test_statistics_of_a_large_offset_keep_their_digits() -> None:
    _, std = objective.statistics([1000 + 0.1 * torch.randn(4, 1, 64, 64)])
    assert float(std) == pytest.approx(0.1, rel=0.02)


@torch.no_grad()
def test_the_statistics_in_the_file_are_those_of_its_detail_latents(stages: Any) -> None:
    recipe = from_command_line(AUTOENCODER, "", stages.command("autoencoder", stages.folder("autoencoder"), 2))
    model = checkpoints.load_autoencoder(stages.file("autoencoder"))
    mean, std = objective.statistics(model.encode_detail(x) for x in survey(recipe, 16))
    assert torch.allclose(torch.tensor(model.latent.detail_mean), mean, atol=1e-5)
    assert torch.allclose(torch.tensor(model.latent.detail_std), std, rtol=1e-4)
    z = torch.cat([model.latent.normalise(model.encode(x))[:, 16:] for x in survey(recipe, 16)])
    assert torch.allclose(z.mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-3)
    assert torch.allclose(z.std(dim=(0, 2, 3)), torch.ones(16), atol=0.01)


def test_the_base_vae_in_the_file_is_the_base_file_bit_for_bit(stages: Any, tmp_path: Path) -> None:
    assert stages.run("autoencoder", tmp_path, 3, "--optimiser.lr", "0.1", "--optimiser.weight-decay", "0.1") == 0
    base, _ = files.read(stages.file("base_autoencoder"))
    davae = {name.split("/", 1)[1]: tensor for name, tensor in stages.exported("autoencoder", tmp_path).items()}
    for name, tensor in base.items():
        assert torch.equal(davae[f"base_{name}"], tensor), name
    shared = [name for name in base if name.startswith("decoder.") and f"{name}" in davae]
    assert shared and not any(torch.equal(davae[name], base[name]) for name in shared if name.endswith(".weight"))


def test_what_is_frozen_is_not_in_the_optimiser(stages: Any) -> None:
    trained = {name.split(".")[1] for name in stages.weights(stages.folder("autoencoder")) if "/weight/" in name}
    assert trained == {"detail_down", "joint_up", "decoder"}


def test_a_trunk_of_its_own_starts_at_the_base_and_is_trained(stages: Any, tmp_path: Path) -> None:
    assert stages.run("autoencoder", tmp_path, 2, "--train-trunk") == 0
    base, _ = files.read(stages.file("base_autoencoder"))
    davae = {name.split("/", 1)[1]: tensor for name, tensor in stages.exported("autoencoder", tmp_path).items()}
    trunk = [name for name in davae if name.startswith("detail_trunk.") and name.endswith(".weight")]
    assert len(trunk) > 10
    for name in trunk:
        before = base[name.replace("detail_trunk.", "encoder.")]
        assert not torch.equal(davae[name], before)
        assert torch.allclose(davae[name], before, atol=1e-2)
    model = checkpoints.load_autoencoder(tmp_path / stages.exports["autoencoder"][0])
    assert not model.config.shared_trunk


@torch.no_grad()
def test_a_new_da_vae_has_the_base_latent_and_the_base_decoder() -> None:
    base = Autoencoder(TOY)
    model = on_base(base, 16, 2, train_trunk=False)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = model.encode(x)
    assert torch.equal(model.latent.split(z)[0], base.encode(model.shrink(x)))
    assert torch.equal(model.decode_base(z[:, :16]), base.decode(z[:, :16]))
    assert {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("base_")} == set()
    assert isinstance(model.base_encoder, Encoder)


def test_the_alignment_is_a_part_of_the_loss_with_its_weight(stages: Any, tmp_path: Path) -> None:
    assert stages.run("autoencoder", tmp_path, 1, "--alignment.weight", "0.7") == 0
    at = {name.split("/")[-1]: points[1] for name, points in stages.curves(tmp_path).items()}
    assert at["loss"] == pytest.approx(2 * at["l1"] + 1e-7 * at["kl"] + 0.7 * at["alignment"], rel=1e-5)


def test_the_adaptive_alignment_is_a_part_of_the_loss_with_its_weight(stages: Any, tmp_path: Path) -> None:
    assert stages.run("autoencoder", tmp_path, 2, "--alignment.weight", "0.5", "--alignment.adaptive") == 0
    for step in (1, 2):
        at = {name.split("/")[-1]: points[step] for name, points in stages.curves(tmp_path).items()}
        aligned = at["alignment_weight"] * at["alignment"]
        assert at["loss"] == pytest.approx(2 * at["l1"] + 1e-7 * at["kl"] + aligned, rel=1e-5)
        assert at["alignment_weight"] > 0


def test_alignment_lowers_the_distance_to_the_base_latent(stages: Any, tmp_path: Path) -> None:
    for weight in ("0", "5"):
        assert stages.run("autoencoder", tmp_path / weight, 12, "--alignment.weight", weight) == 0
    free, drawn = (stages.curves(tmp_path / weight)["autoencoder/alignment"] for weight in ("0", "5"))
    assert free[1] == drawn[1]
    assert drawn[12] < 0.8 * free[12]


def test_the_ratio_of_gradients_is_that_of_their_norms() -> None:
    parameter = torch.randn(3, 2, requires_grad=True)
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    ratio = gradient_ratio((parameter * x).sum(), 3 * (parameter * y).sum(), parameter)
    assert torch.allclose(ratio, x.norm() / (3 * y.norm()), rtol=1e-5)
    assert not ratio.requires_grad
    assert parameter.grad is None
    assert gradient_ratio((parameter * x).sum(), (parameter * 0).sum(), parameter) == 1e4


def test_detail_dropout_hides_the_whole_detail_latent_of_a_sample(stages: Any, tmp_path: Path) -> None:
    # With all of it hidden the reconstruction teaches the detail branch nothing.
    options = ["--alignment.weight", "0", "--losses.kl", "0", "--detail-dropout"]
    for share in ("1", "0"):
        assert stages.run("autoencoder", tmp_path / share, 2, *options, share) == 0
    moments = {
        share: stages.weights(tmp_path / share)["autoencoder/moment/model.detail_down.conv.weight/exp_avg"].abs().sum()
        for share in ("1", "0")
    }
    assert moments["1"] == 0 < moments["0"]


def test_a_base_autoencoder_learns(stages: Any, tmp_path: Path) -> None:
    assert stages.run("base_autoencoder", tmp_path, 30) == 0
    losses = stages.curves(tmp_path)["autoencoder/l1"]
    assert losses[30] < 0.75 * losses[1]


def test_a_run_can_start_from_a_trained_da_vae(stages: Any, tmp_path: Path) -> None:
    assert (
        stages.run("autoencoder", tmp_path, 1, "--start", str(stages.file("autoencoder")), "--optimiser.lr", "0") == 0
    )
    assert all(
        torch.equal(tensor, stages.exported("autoencoder", stages.folder("autoencoder"))[name])
        for name, tensor in stages.exported("autoencoder", tmp_path).items()
    )


def test_a_run_can_start_from_a_decoder_with_a_detail_branch_of_its_own(stages: Any, tmp_path: Path) -> None:
    """Of another shape than the one that the decoder was trained with."""
    more = ["--decoder", str(stages.file("autoencoder")), "--detail-channels", "32", "--optimiser.lr", "0"]
    assert stages.run("autoencoder", tmp_path, 1, *more) == 0
    one, other = (
        checkpoints.load_autoencoder(folder / stages.exports["autoencoder"][0])
        for folder in (stages.folder("autoencoder"), tmp_path)
    )
    assert (one.latent.detail_channels, other.latent.detail_channels) == (16, 32)
    state, new = one.state_dict(), other.state_dict()
    for name, tensor in state.items():
        same = name in new and torch.equal(tensor, new[name])
        assert same == (not name.startswith(("joint_up.", "detail_down."))), name


def test_a_decoder_is_not_given_twice_and_not_of_another_base(stages: Any, tmp_path: Path) -> None:
    own = str(stages.file("autoencoder"))
    with pytest.raises(DAVAEError, match="leave one of --start and --decoder out"):
        stages.run("autoencoder", tmp_path / "twice", 1, "--start", own, "--decoder", own)
    more = ["--run.seed", "7", "--optimiser.lr", "0.01"]
    assert stages.run("base_autoencoder", tmp_path / "base", 1, *more) == 0
    other = tmp_path / "base" / stages.exports["base_autoencoder"][0]
    with pytest.raises(DAVAEError, match="made on another base VAE"):
        stages.run("autoencoder", tmp_path / "out", 1, "--decoder", own, "--base", str(other))


def test_a_start_of_another_shape_is_refused(stages: Any, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"davae_tiny_autoencoder\.safetensors is a DA-VAE of another shape"):
        stages.run("autoencoder", tmp_path, 1, "--start", str(stages.file("autoencoder")), "--detail-channels", "32")


def test_a_start_on_another_base_vae_is_refused(stages: Any, tmp_path: Path) -> None:
    more = ["--run.seed", "7", "--optimiser.lr", "0.01"]
    assert stages.run("base_autoencoder", tmp_path / "base", 1, *more) == 0
    other = tmp_path / "base" / stages.exports["base_autoencoder"][0]
    start = ["--start", str(stages.file("autoencoder")), "--base", str(other)]
    with pytest.raises(DAVAEError, match="made on another base VAE"):
        stages.run("autoencoder", tmp_path / "out", 1, *start)


def test_a_frozen_detail_branch_keeps_its_latents_and_their_statistics(stages: Any, tmp_path: Path) -> None:
    start = ["--start", str(stages.file("autoencoder")), "--freeze-detail"]
    assert stages.run("autoencoder", tmp_path, 2, *start, "--run.seed", "5") == 0
    before, after = (
        checkpoints.load_autoencoder(f / stages.exports["autoencoder"][0])
        for f in (stages.folder("autoencoder"), tmp_path)
    )
    assert after.latent == before.latent
    old, new = before.state_dict(), after.state_dict()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"joint_up", "decoder"}


@pytest.mark.parametrize(
    ("more", "message"), [([], "give its file as --start"), (["--alignment.adaptive"], "no-adaptive")]
)
def test_what_does_not_go_with_a_frozen_detail_branch_is_said(
    stages: Any, tmp_path: Path, more: list[str], message: str
) -> None:
    start = ["--start", str(stages.file("autoencoder"))] if more else []
    with pytest.raises(DAVAEError, match=message):
        stages.run("autoencoder", tmp_path, 1, "--freeze-detail", *start, *more)


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
def test_a_detail_dropout_that_is_no_share_is_refused(dropout: float) -> None:
    _, recipe = AUTOENCODER["micro"]
    with pytest.raises(DAVAEError, match=rf"--detail-dropout must be from 0 to 1, got {dropout}"):
        replace(recipe, detail_dropout=dropout)


@pytest.mark.parametrize(
    "name",
    ["state.safetensors", "State.safetensors", "a/b.safetensors", "a\\b.safetensors", "davae.pt", ".safetensors"],
)
def test_a_file_that_a_run_cannot_leave_is_refused(stages: Any, tmp_path: Path, name: str) -> None:
    said = r"--file must be the name of a \.safetensors file, without a folder \(--run\.out names that\), got '"
    with pytest.raises(DAVAEError, match=said):
        stages.run("autoencoder", tmp_path / "run", 1, "--file", name)
    assert not (tmp_path / "run").exists()
