"""The adversary of stage 1."""

from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core.errors import DAVAEError
from davae_core.training.recipes.tiny import AUTOENCODER
from davae_core.training.run.config import from_command_line
from davae_core.training.tasks.autoencoder import AutoencoderTask
from davae_core.training.tasks.critic import CriticConfig, CriticPhase, PatchCritic

CRITIC = {"weight": "0.5", "start": "2", "width": "8", "layers": "2"}
OPTIONS = ["--alignment.weight", "0", *(part for name in CRITIC for part in (f"--critic.{name}", CRITIC[name]))]


def test_the_critic_gives_a_score_to_every_patch() -> None:
    assert PatchCritic(8, layers=3)(torch.randn(2, 3, 64, 32)).shape == (2, 1, 6, 2)


def test_the_critic_sees_patches_and_not_the_whole_image() -> None:
    critic = PatchCritic(8, layers=1)
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    critic(x)[0, 0, 10, 10].backward()
    assert x.grad is not None
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    # Group norm looks at the whole image, but hardly: convolutions tell the patch.
    strong = (x.grad.abs().sum(dim=(0, 1, 3)) > x.grad.abs().sum(dim=(0, 1, 3)).max() / 20).nonzero().flatten()
    assert strong.max() - strong.min() < 20 < rows.max() - rows.min()


def test_the_hinge_loss_asks_for_scores_beyond_one_on_either_side() -> None:
    class Told(torch.nn.Module):
        """Scores 3 for images of 1, -0.5 for others."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x[:, :1] == 1, 3.0, -0.5)

    phase = CriticPhase(Told(), 0, {0: torch.zeros(2, 3, 4, 4)})  # type: ignore[arg-type]
    parts = phase({"image": torch.ones(2, 3, 4, 4), "micro": 0}, 0)
    assert {name: float(value) for name, value in parts.items()} == {"loss": 0.25, "real": 3.0, "fake": -0.5}


def test_a_critic_learns_to_tell_images_from_reconstructions() -> None:
    torch.manual_seed(1)
    phase = CriticPhase(PatchCritic(8, layers=1), 0, {0: torch.zeros(4, 3, 16, 16)})
    optimiser = torch.optim.Adam(phase.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = phase({"image": torch.randn(4, 3, 16, 16), "micro": 0}, 0)["loss"]
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 < losses[0]


def test_the_critic_starts_at_its_step_and_not_before(stages: Any, tmp_path: Path) -> None:
    assert stages.run("autoencoder", tmp_path, 4, *OPTIONS) == 0
    curves = stages.curves(tmp_path)
    for name in ("critic/loss", "critic/real", "critic/fake", "autoencoder/adversarial"):
        assert sorted(curves[name]) == [3, 4], name
    assert sorted(curves["autoencoder/l1"]) == [1, 2, 3, 4]
    steps = [t for name, t in stages.weights(tmp_path).items() if name.startswith("critic/") and name.endswith("/step")]
    assert steps and all(step == 2 for step in steps)


def test_until_the_critic_starts_the_run_is_one_without_a_critic(stages: Any, tmp_path: Path) -> None:
    assert stages.run("autoencoder", tmp_path / "with", 4, *OPTIONS) == 0
    assert stages.run("autoencoder", tmp_path / "without", 4, "--alignment.weight", "0") == 0
    one, other = (stages.curves(tmp_path / name)["autoencoder/loss"] for name in ("with", "without"))
    assert [one[step] == other[step] for step in (1, 2, 3, 4)] == [True, True, False, False]


def test_the_loss_of_the_autoencoder_has_the_critics_score_in_it(stages: Any, tmp_path: Path) -> None:
    assert stages.run("autoencoder", tmp_path, 3, *OPTIONS) == 0
    at = {name.removeprefix("autoencoder/"): points.get(3, 0.0) for name, points in stages.curves(tmp_path).items()}
    assert at["loss"] == pytest.approx(2 * at["l1"] + 1e-7 * at["kl"] + 0.5 * at["adversarial"], rel=1e-4)
    assert at["adversarial"] == pytest.approx(-at["critic/fake"], rel=1e-4)


def test_the_phases_do_not_talk_through_the_batch(stages: Any, tmp_path: Path) -> None:
    # On several GPUs DistributedDataParallel gives each phase a copy of it.
    recipe = from_command_line(AUTOENCODER, "", stages.command("autoencoder", tmp_path, 1, *OPTIONS))
    task = AutoencoderTask(recipe, lambda: ())
    batch = {"image": torch.rand(2, 3, 32, 32), "position": torch.arange(2), "micro": 0}
    for phase in task.phases.values():
        assert phase(dict(batch), 2)["loss"].isfinite()


@pytest.mark.parametrize("width", [10, 0, -4])
def test_a_width_that_the_norms_cannot_take_is_named(width: int) -> None:
    with pytest.raises(DAVAEError, match=rf"--critic\.width must be a multiple of 4, as 32 or 64, got {width}"):
        CriticConfig(weight=0.1, width=width)
    CriticConfig(weight=0.0, width=width)  # there is no critic
    with pytest.raises(DAVAEError, match=r"--critic\.layers must be at least 0, got -1"):
        CriticConfig(weight=0.1, layers=-1)


@pytest.mark.parametrize(("width", "layers"), [(4, 1), (12, 3), (10, 0)])
def test_other_widths_make_a_critic(width: int, layers: int) -> None:
    config = CriticConfig(weight=0.1, width=width, layers=layers)
    assert PatchCritic(config.width, config.layers)(torch.zeros(1, 3, 64, 64)).shape[:2] == (1, 1)
