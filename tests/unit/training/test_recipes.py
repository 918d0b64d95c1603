"""The recipes of SD3.5-medium: the published figures, and the ways to start them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints, records, sampling
from davae_core.embeddings import KIND, key_of
from davae_core.errors import DAVAEError
from davae_core.latent import LatentSpec
from davae_core.training import recipes
from davae_core.training import stages as entry
from davae_core.training.recipes.sd3_vae import SD3_VAE_F16
from davae_core.training.recipes.sd35m import SD35M_1024, SD35M_2048
from davae_core.training.run import config
from davae_core.training.tasks import adapted
from davae_core.training.tasks.adapted import AdaptedModel
from davae_core.training.tasks.adapter import AdapterRecipe
from davae_core.training.text.encode import captions_in


def test_every_recipe_has_its_name_on_the_command_line() -> None:
    assert {"micro", "tiny", "sd35m_1024", "sd35m_2048"} <= recipes.ADAPTER.keys()
    assert {"micro", "tiny", "micro-finish", "sd3_vae_f16"} <= recipes.AUTOENCODER.keys()


@pytest.mark.parametrize("recipe", [SD35M_1024, SD35M_2048])
def test_the_published_figures_of_stage_two(recipe: AdapterRecipe) -> None:
    assert (recipe.run.batch, recipe.rank, recipe.flow.shift, recipe.flow.min_snr) == (96, 256, 4.0, 5.0)
    assert (recipe.optimiser.lr, recipe.optimiser.weight_decay, recipe.optimiser.ema) == (1e-4, 0.0, 0.999)
    assert (recipe.optimiser.betas, recipe.optimiser.clip) == ((0.9, 0.999), 0.5)
    assert (recipe.flow.prompt_dropout, recipe.recommended.cfg, recipe.recommended.steps) == (0.1, 2.5, 30)
    assert recipe.run.precision == "bf16" and recipe.gradient_checkpointing
    assert recipe.targets == ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2", "norm1.linear")
    assert (SD35M_1024.detail_warmup, SD35M_1024.data.size, SD35M_2048.data.size) == (10_000, 1024, 2048)


def test_the_published_figures_of_stage_one() -> None:
    recipe = SD3_VAE_F16
    assert (recipe.losses.l1, recipe.losses.perceptual, recipe.losses.kl) == (2.0, 1.0, 1e-7)
    assert (recipe.alignment.weight, recipe.alignment.adaptive, recipe.critic.weight) == (0.2, False, 0.0)
    assert (recipe.optimiser.lr, recipe.optimiser.weight_decay, recipe.optimiser.clip) == (1e-4, 1e-4, 1.0)
    assert (recipe.optimiser.betas, recipe.optimiser.warmup) == ((0.9, 0.99), 1000)
    assert (recipe.run.batch, recipe.run.precision, recipe.data.size) == (128, "bf16", 1024)
    assert (recipe.detail_channels, recipe.scale, recipe.train_trunk) == (16, 2, False)


@pytest.mark.parametrize(
    ("stage", "name", "needed"),
    [
        ("adapter", "sd35m_1024", ["--model", "--autoencoder", "--embeddings", "--data.images"]),
        ("adapter", "sd35m_2048", ["--model", "--start"]),
        ("autoencoder", "sd3_vae_f16", ["--base", "--data.images"]),
    ],
)
def test_what_only_the_user_has_is_asked_for(
    stage: str, name: str, needed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        entry.run(stage, [name])
    said = capsys.readouterr()
    assert all(option in said.out + said.err for option in needed)


def test_a_run_starts_from_what_the_adapter_has_learned(stages: Any, tmp_path: Path) -> None:
    first = stages.file("adapter")
    learned = checkpoints.load_adapter(first)
    assert stages.run("adapter", tmp_path, 1, "--start", str(first), "--optimiser.lr", "0", "--optimiser.ema", "0") == 0
    same = checkpoints.load_adapter(tmp_path / stages.exports["adapter"][0])
    assert same.state.keys() == learned.state.keys()
    for name, tensor in learned.state.items():
        torch.testing.assert_close(same.state[name], tensor, atol=1e-6, rtol=0)
    assert learned.state["davae.x_embedder.proj.detail.weight"].abs().max() > 1e-4, "nothing to start from"


@pytest.mark.parametrize(("more", "said"), [(["--rank", "0"], r"is .*, expected .*--rank"), ([], "another DA-VAE")])
def test_an_adapter_of_another_shape_or_latent_is_no_start(
    stages: Any, tmp_path: Path, more: list[str], said: str
) -> None:
    first = checkpoints.load_adapter(stages.file("adapter"))
    if not more:
        latent = replace(first.config.latent, detail_mean=(3.0,) * 16)
        first = replace(first, config=replace(first.config, latent=latent))
    checkpoints.save_adapter(tmp_path / "first.safetensors", first)
    with pytest.raises(DAVAEError, match=said):
        stages.run("adapter", tmp_path / "run", 1, "--start", str(tmp_path / "first.safetensors"), *more)


def test_units_are_the_same_whether_told_once_or_for_each_channel() -> None:
    told = LatentSpec(detail_std=(2.0,) * 16)
    each = replace(told, base_shift=(told.base_shift,) * 16, base_scale=(told.base_scale,) * 16)
    assert adapted.units(each) == adapted.units(told)
    assert adapted.units(replace(each, base_shift=(0.0,) * 16)) != adapted.units(told)
    assert len(adapted.units(told)) == 2 * 32


@pytest.fixture
def embedded(stages: Any, tmp_path: Path) -> Path:
    """What the text encoder makes of every caption of the images, as ``davae_core.training.text`` stores it."""
    text = checkpoints.load_text_encoder(stages.file("base_dit", 1)).float()
    made: dict[str, records.Record] = {}
    for caption in captions_in([str(stages.images)]):
        with torch.no_grad():
            context, pooled = sampling.encode_captions(text, [caption])
        made[key_of(caption)] = {"clip": context[0, :3], "t5": context[0, 3:], "pooled": pooled[0]}
    about = {"context": context.shape[-1], "pooled": pooled.shape[-1]}
    folder = tmp_path / "embeddings"
    folder.mkdir()
    records.write(folder, 0, made, KIND, about)
    records.finish(folder, KIND, about)
    return folder


def test_captions_that_come_as_embeddings_are_read_as_the_encoder_would_give_them(
    stages: Any, tmp_path: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[torch.Tensor]] = {"encoder": [], "embeddings": []}
    forward, options = AdaptedModel.forward, ["--flow.word-dropout", "0", "--run.sample-every", "2"]
    options += ["--run.precision", "fp32"]  # under autocast the encoder's own products would be rounded
    more = {"encoder": [], "embeddings": ["--text-encoder", "None", "--embeddings", str(embedded)]}
    for name, told in read.items():

        def noted(model: Any, x: Any, t: Any, *text: Any, told: list[torch.Tensor] = told) -> torch.Tensor:
            told += text[:2]
            return forward(model, x, t, *text)

        monkeypatch.setattr(AdaptedModel, "forward", noted)
        assert stages.run("adapter", tmp_path / name, 2, *options, *more[name]) == 0
    assert len(read["encoder"]) > 4, "no sheet was drawn"
    torch.testing.assert_close(read["embeddings"], read["encoder"])
    with pytest.raises(DAVAEError, match=r"no embedding.*word_dropout=0\.5"):
        stages.run("adapter", tmp_path / "other", 2, *more["embeddings"], "--flow.word-dropout", "0.5")


def test_captions_have_one_source(stages: Any, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"give one of --text-encoder .* and --embeddings"):
        stages.run("adapter", tmp_path, 1, "--embeddings", str(tmp_path))


def test_weights_held_in_bf16_need_a_pass_in_bf16(stages: Any, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"--run\.precision bf16"):
        stages.run("adapter", tmp_path, 1, "--frozen", "bf16", "--run.precision", "fp32")


def test_frozen_matrices_in_bf16_predict_what_they_do_in_fp32_under_autocast(mmdit: Any) -> None:
    base = {name: tensor.bfloat16() for name, tensor in mmdit.state_dict().items()}
    kinds = torch.float32, torch.bfloat16
    models = [AdaptedModel(base, LatentSpec(), 4, SD35M_1024.targets, 0, frozen=kind) for kind in kinds]
    x, t = torch.randn(1, 32, 8, 8), torch.rand(1)
    context, pooled = torch.randn(1, 5, 48), torch.randn(1, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = (model(x, t, context, pooled) for model in models)
    assert torch.equal(one, other)
    halves = [p for p in models[1].parameters() if p.dtype == torch.bfloat16]
    assert halves and not any(p.requires_grad for p in halves)


def test_recomputation_changes_no_loss_of_the_autoencoder(stages: Any, tmp_path: Path) -> None:
    for name, more in (("plain", []), ("again", ["--gradient-checkpointing"])):
        assert stages.run("autoencoder", tmp_path / name, 2, *more) == 0
    assert stages.curves(tmp_path / "plain") == stages.curves(tmp_path / "again")


def test_the_compile_switch_reaches_the_parts_called(
    stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def compiled(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        module.register_forward_hook(lambda *a: called.append(type(module).__name__))

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    for stage, name in (("adapter", "AdaptedModel"), ("autoencoder", "Level"), ("autoencoder", "Middle")):
        called.clear()
        assert stages.run(stage, tmp_path / f"{stage}{name}", 1, "--run.compile") == 0
        assert name in called


def test_a_recipe_is_flat_json_once_its_files_are_given() -> None:
    files = {name: Path(name) for name in ("model", "autoencoder", "embeddings", "start")}
    recipe = replace(SD35M_2048, **files, data=replace(SD35M_2048.data, images=("here",)))
    assert config.flat(recipe)["start"] == "start"
