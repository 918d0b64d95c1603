"""Stage 3: what the student is asked for, what a run leaves, and that no other LoRA has a part in it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints, sampling, tiny
from davae_core.adapter import merge
from davae_core.checkpoints import files, metadata
from davae_core.errors import DAVAEError
from davae_core.evaluation.family import FamilyFiles, load_family
from davae_core.history import History
from davae_core.lora import LORA_MODULES, add_lora
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.prompts import encode
from davae_core.sampling import Sampling
from davae_core.training import stages as entry
from davae_core.training.data.draws import Draws
from davae_core.training.objective import noised
from davae_core.training.recipes import tiny as recipes
from davae_core.training.run import state
from davae_core.training.tasks.distribution import FAKE
from davae_core.training.tasks.few_step_model import TEACHER, FewStepModel
from davae_core.training.tasks.few_steps import FewStepsRecipe, FewStepsTask
from davae_core.training.tasks.rollout import STUDENT
from harness.untrained import Family as Untrained

METHODS = ("trajectory", "distribution")
CAPTIONS = ["3d peach", "flat rocket", "flat peach"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a family whose every layer has an effect, by the setting that names them."""
    folder = tmp_path_factory.mktemp("toys")
    family = Untrained()
    family.write(folder)
    return {
        "model": folder / "diffusion_models" / family.model_file,
        "text_encoder": folder / "text_encoders" / family.text_file,
        "adapter": folder / "loras" / family.adapter_file,
        "autoencoder": folder / "vae" / family.davae_file,
    }


@pytest.fixture
def recipe(toys: dict[str, Path]) -> Callable[..., FewStepsRecipe]:
    """``recipe(**changes)``: toy models, 2 steps, guidance 3, in fp32."""

    def make(**changes: Any) -> FewStepsRecipe:
        first = recipes.FEW_STEPS["micro"][1]
        first = replace(first, data=replace(first.data, size=64), run=replace(first.run, precision="fp32", seed=3))
        given = {**toys, "rank": 4, "steps": 2, "substeps": 3, "cfg": 3.0, "shift": 2.0}
        return replace(first, **given | changes)

    return make


def batch(count: int = 3) -> dict[str, Any]:
    return {
        "latent": torch.zeros(count, 32, 4, 4),
        "caption": CAPTIONS[:count],
        "position": torch.arange(count),
        **{"micro": 0, "micros": 1},
    }


def shake(task: FewStepsTask, *names: str) -> None:
    """Give LoRAs, which begin with no effect, some."""
    generator = torch.Generator().manual_seed(1)
    for name in names:
        for factor in task.model.factors(name).values():
            factor.data.normal_(std=0.2, generator=generator)


def drawn(task: FewStepsTask, noise: torch.Tensor, how: Sampling, name: str) -> torch.Tensor:
    device = noise.device
    asked, empty = (encode(task.text, some, device) for some in (CAPTIONS, [""] * len(CAPTIONS)))
    task.model.use(name)
    return sampling.sample_encoded(task.model, asked, empty, noise, how)


def test_the_teachers_end_of_all_steps_is_what_it_draws_with_guidance(recipe: Any) -> None:
    task = FewStepsTask(recipe(steps=1, substeps=5), lambda: [])
    draws = Draws(3, 0, torch.arange(3))
    point = task.rollout.begin(batch(), draws)
    assert torch.equal(point.x, draws.normal("noise", batch()["latent"]))
    told = drawn(task, point.x, Sampling(shift=2.0, cfg=3.0, steps=5), TEACHER)
    assert torch.allclose(task.rollout.solved(point, 5), told, atol=1e-5)


def test_the_student_begins_where_its_own_steps_have_led(recipe: Any) -> None:
    task = FewStepsTask(recipe(steps=3), lambda: [])
    shake(task, STUDENT)
    draws = Draws(3, 5, torch.arange(3))
    point = task.rollout.begin(batch(), draws)
    noise = draws.normal("noise", batch()["latent"])
    for i in range(3):
        steps, times = int(point.step[i]), [1.0, 0.8, 0.5, 0.0]  # evenly spaced, then shifted by 2
        assert (point.now[i].item(), point.after[i].item()) == pytest.approx((times[steps], times[steps + 1]))
        asked, x = encode(task.text, [CAPTIONS[i]], torch.device("cpu")), noise[i : i + 1]
        task.model.use(STUDENT)
        for now, after in zip(times[:steps], times[1:]):
            x = x + (after - now) * task.model(x, torch.tensor([now]), *asked)
        assert torch.allclose(point.x[i : i + 1], x, atol=1e-5)
    reached = {int(n) for s in range(8) for n in task.rollout.begin(batch(), Draws(3, s, torch.arange(3))).step}
    assert reached == {0, 1, 2}


def test_the_trajectory_is_learned_without_an_error_where_the_student_is_the_teacher(recipe: Any) -> None:
    """One step of the teacher's for one of its own, no guidance: nothing is to be learned."""
    task = FewStepsTask(recipe(substeps=1, cfg=1.0), lambda: [])
    losses = task.phases["student"](batch(), 0)
    assert losses["loss"].item() < 1e-10
    other = FewStepsTask(recipe(substeps=1, cfg=3.0), lambda: []).phases["student"](batch(), 0)
    assert other["loss"].item() > 1e-3
    assert other["loss"].item() == pytest.approx((other["base"] + other["detail"]).item() / 2, rel=1e-5)


def test_the_students_pictures_are_moved_by_the_difference_of_the_two_scores(recipe: Any) -> None:
    """With no guidance and before the third model has learned anything there is none; and its gradient is that of the
    picture, divided by the size of the teacher's correction."""
    task = FewStepsTask(recipe(method="distribution", cfg=1.0), lambda: [])
    assert task.phases["student"](batch(), 0)["loss"].item() == 0
    task = FewStepsTask(recipe(method="distribution"), lambda: [])
    shake(task, STUDENT, FAKE)
    phase = task.phases["student"]
    loss = phase(batch(), 0)["loss"]
    x0, point = phase.drawn[0]  # type: ignore[index]
    seen = noised(x0, Draws(3 + 1, 0, torch.arange(3)), phase.times)  # type: ignore[arg-type]
    t = seen.t.view(-1, 1, 1, 1)
    real = seen.x - t * task.rollout.teacher(seen.x, seen.t, point)
    task.model.use(FAKE)
    with torch.no_grad():
        fake = seen.x - t * task.model(seen.x, seen.t, *point.asked)
    direction = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    assert loss.item() == pytest.approx(0.5 * direction.square().mean().item(), rel=1e-4)
    task.model.use(STUDENT)
    own = list(phase.parameters())
    drawn_again = point.x - point.now.view(-1, 1, 1, 1) * task.model(point.x, point.now, *point.asked)
    assert torch.allclose(drawn_again, x0, atol=1e-4)
    wanted = torch.autograd.grad(drawn_again, own, direction / direction.numel())
    found = torch.autograd.grad(phase(batch(), 0)["loss"], own)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_the_third_model_learns_what_the_student_has_drawn(recipe: Any) -> None:
    task = FewStepsTask(recipe(method="distribution"), lambda: [])
    assert list(task.phases) == ["student", "fake"]
    task.phases["student"](batch(), 0)
    loss = task.phases["fake"](batch(), 0)["loss"]
    loss.backward()
    trained = {name: p for name, p in task.phases["fake"].named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("factors.") for name in trained)
    assert all(p.grad is None for p in task.phases["student"].parameters())


def test_one_lora_counts_at_a_time_and_for_the_teacher_none(recipe: Any, toys: dict[str, Path]) -> None:
    task = FewStepsTask(recipe(method="distribution"), lambda: [])
    shake(task, STUDENT, FAKE)
    adapted = merge(files.read(toys["model"])[0], checkpoints.load_adapter(toys["adapter"]))
    x, t = torch.randn(3, 32, 4, 4, generator=torch.Generator().manual_seed(1)), torch.full((3,), 0.7)
    asked, outs = encode(task.text, CAPTIONS, torch.device("cpu")), {}
    for name in (STUDENT, FAKE, TEACHER):
        task.model.use(name)
        folded = add_lora(adapted, task.model.lora(name)) if name else adapted
        plain = MMDiT(MMDiTConfig.from_state_dict(folded))
        plain.load_state_dict(folded)
        with torch.no_grad():
            outs[name] = task.model(x, t, *asked)
            assert torch.allclose(outs[name], plain(x, t, *asked), atol=1e-4), name
    assert not torch.allclose(outs[STUDENT], outs[TEACHER], atol=0.1)
    assert not torch.allclose(outs[STUDENT], outs[FAKE], atol=0.1)


def test_every_layer_can_have_one(recipe: Any) -> None:
    task = FewStepsTask(recipe(targets=tuple(LORA_MODULES)), lambda: [])
    changed = {name.split(".", 3)[3].partition(".lora_")[0] for name in task.model.lora(STUDENT) if "lora_A" in name}
    assert changed == set(LORA_MODULES)


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_changes_no_gradient(recipe: Any, method: str) -> None:
    gradients = []
    for again in (False, True):
        task = FewStepsTask(recipe(method=method, gradient_checkpointing=again), lambda: [])
        shake(task, *task.model.places)
        for phase in task.phases.values():
            phase(batch(), 0)["loss"].backward()
        gradients.append([p.grad for phase in task.phases.values() for p in phase.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run(stages: Any, tmp_path: Path, method: str) -> None:
    more = ("--method", method, "--run.precision", "fp32", "--optimiser.schedule", "constant")
    assert stages.run("steps", tmp_path / "whole", 4, *more) == 0
    assert stages.run("steps", tmp_path / "cut", 2, *more) == 0
    assert stages.run("steps", tmp_path / "cut", 4, *more, "--run.resume") == 0
    one, two = (state.load(tmp_path / name).tensors for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_learns_to_do_without_guidance(toys: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*CAPTIONS, "3d rocket"]))
    given = [word for name, path in toys.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    held = tmp_path / "held.txt"
    held.write_text("flat flat peach")
    common = f"micro --data.images {prompts} --data.held-out {held} --data.size 64 --run.out {tmp_path / 'run'}"
    more = "--run.steps 160 --run.batch 4 --run.validate-every 160 --run.sample-every 0 --run.precision fp32 --steps 2"
    more += " --substeps 2 --cfg 3 --rank 16 --optimiser.lr 1e-2 --optimiser.warmup 0 --optimiser.ema 0"
    assert entry.run("steps", [*common.split(), *more.split(), *given]) == 0
    lines = (tmp_path / "run" / "validation.jsonl").read_text("utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    assert [line["step"] for line in told] == [0, 160]
    for group in ("base", "detail"):
        assert 0 < told[1][f"{group}_from_teacher"] < 0.5 * told[0][f"{group}_from_teacher"], told


def test_the_file_tells_how_it_is_sampled_and_which_model_it_is_for(stages: Any) -> None:
    path = stages.file("steps")
    lora = checkpoints.load_few_step_lora(path)
    adapter = checkpoints.load_adapter(stages.file("adapter"))
    assert vars(lora.recommended) == {"size": 32, "shift": 2.0, "cfg": 1.0, "steps": 2}
    assert lora.latent == adapter.config.latent and lora.hidden == 64
    history = metadata.history_of(files.read_metadata(path)[1], path.name)
    assert history is not None and set(history.of) == {"base_model", "davae", "adapted_model"}
    assert history.of["adapted_model"].name == tiny.ADAPTER and len(history.of["adapted_model"].values) == 4


def test_an_evaluation_draws_what_the_student_draws(recipe: Any, toys: dict[str, Path], tmp_path: Path) -> None:
    task = FewStepsTask(recipe(), lambda: [])
    shake(task, STUDENT)
    (path,) = task.export(tmp_path, History())
    family = load_family(FamilyFiles(**toys, few_steps=path))
    assert (family.recommended.steps, family.recommended.cfg) == (2, 1.0)
    noise = torch.randn(3, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    how = Sampling(family.recommended.shift, 1.0, 2)
    told = sampling.sample_encoded(family.adapted, family.encode(CAPTIONS), family.encode([""] * 3), noise, how)
    assert torch.allclose(told, drawn(task, noise, how, STUDENT), atol=1e-4)
    assert not torch.allclose(told, drawn(task, noise, how, TEACHER), atol=1e-2)


def test_it_goes_on_from_a_lora_of_its_rank(stages: Any, tmp_path: Path) -> None:
    start = str(stages.file("steps"))
    assert stages.run("steps", tmp_path / "more", 1, "--start", start, "--optimiser.lr", "0") == 0
    one, two = (checkpoints.load_few_step_lora(p) for p in (start, tmp_path / "more" / tiny.FEW_STEPS))
    assert all(torch.equal(tensor, two.state[name]) for name, tensor in one.state.items())
    with pytest.raises(DAVAEError, match="rank 4; give it as --rank"):
        stages.run("steps", tmp_path / "rank", 1, "--start", start, "--rank", "8")


def test_frozen_weights_in_bf16_leave_the_lora_in_fp32(recipe: Any) -> None:
    run = replace(recipe().run, precision="bf16")
    model: FewStepModel = FewStepsTask(recipe(run=run, frozen="bf16"), lambda: []).model
    dtypes = {p.dtype for name, p in model.mmdit.named_parameters() if name.endswith("mlp.fc1.weight")}
    assert dtypes == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.factors(STUDENT).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps, --substeps and --rank must be at least 1, got 0"),
        ({"cfg": -1.0}, "--shift and --cfg must be 0 or above"),
        ({"frozen": "bf16"}, "--run.precision bf16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(recipe: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DAVAEError, match=words):
        FewStepsTask(recipe(**changes), lambda: [])


def test_an_adapter_of_another_davae_is_refused(recipe: Any, toys: dict[str, Path], tmp_path: Path) -> None:
    model = checkpoints.load_autoencoder(toys["autoencoder"])
    model.set_detail_statistics([0.5] * 16, [1.0] * 16)
    checkpoints.save_autoencoder(tmp_path / "other.safetensors", model)
    with pytest.raises(DAVAEError, match=r"davae_toy_adapter\.safetensors is for another DA-VAE"):
        FewStepsTask(recipe(autoencoder=tmp_path / "other.safetensors"), lambda: [])
