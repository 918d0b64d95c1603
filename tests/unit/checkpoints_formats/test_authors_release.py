"""The authors' SD3 release, converted, does what its own layout does on diffusers' modules."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel

from davae_core.adapter import merge
from davae_core.checkpoints import authors_autoencoder, convert, files, load_adapter, load_autoencoder
from davae_core.errors import CheckpointError
from davae_core.mmdit import MMDiT, MMDiTConfig


def neighbour(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"formats_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


release, models = neighbour("release"), neighbour("conftest")
Predict = Callable[..., torch.Tensor]


def swapped(z: torch.Tensor, first: int) -> torch.Tensor:
    """The two halves of a latent in the other order; ``first`` channels come first now."""
    return torch.cat([z[:, first:], z[:, :first]], dim=1)


# Autoencoder


@pytest.fixture(scope="module")
def trained() -> AutoencoderKL:
    return models.make_kl(3)


@pytest.mark.parametrize(("scale", "frozen", "nested"), [(2, True, False), (2, False, True), (4, False, False)])
def test_images_and_latents_of_the_autoencoder_stay(
    tmp_path: Path, run, kl: AutoencoderKL, trained: AutoencoderKL, scale: int, frozen: bool, nested: bool
) -> None:
    if frozen:  # the release's recipe: the encoder was not trained
        trained = models.make_kl(3)
        trained.encoder.load_state_dict(kl.encoder.state_dict())
    state = release.autoencoder_state(trained, kl, scale)
    detail = 16 * (scale - 1)
    mean, std = release.MEAN * (scale - 1), release.STD * (scale - 1)
    torch.save({"state_dict": state} if nested else state, tmp_path / "pytorch_model.bin")
    release.write_statistics(tmp_path, mean, std)
    (path,) = run(tmp_path, tmp_path / "out.safetensors")
    model = load_autoencoder(path)
    assert model.config.shared_trunk is frozen
    assert (model.latent.detail_mean, model.latent.detail_std, model.latent.scale) == (mean, std, scale)

    image = torch.rand(1, 3, 16 * scale, 16 * scale)
    wanted = release.encode(trained, kl, state, image, scale)
    wanted[:, :detail] = (wanted[:, :detail] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    z = model.latent.normalise(model.encode(2 * image - 1))
    assert torch.allclose(swapped(z, 16), wanted, atol=1e-4)

    drawn = torch.randn(1, 16 + detail, 2, 2)  # as the diffusion model would give it, [base, detail]
    theirs = drawn[:, 16:] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    shown = release.decode(trained, state, torch.cat([theirs, drawn[:, :16]], dim=1), scale)
    ours = ((model.decode(model.latent.denormalise(drawn)) + 1) / 2).clamp(0, 1)
    assert torch.allclose(ours, shown, atol=1e-4)
    assert ours.std() > 0.05

    base = kl.decode(torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(1))).sample
    z_base = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model.decode_base(z_base), base, atol=1e-4)


def test_a_release_without_its_base_vae_takes_one(
    tmp_path: Path, run, kl: AutoencoderKL, trained: AutoencoderKL
) -> None:
    state = release.autoencoder_state(trained, kl)
    whole = tmp_path / "whole"
    whole.mkdir()
    torch.save(state, whole / "pytorch_model.bin")
    (wanted,) = run(whole, tmp_path / "whole.safetensors", "--statistics", release.write_statistics(tmp_path))
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("original_vae_model.")}
    torch.save(bare, tmp_path / "pytorch_model.bin")
    kl.save_pretrained(tmp_path / "vae")
    source = tmp_path / "pytorch_model.bin"
    with pytest.raises(CheckpointError, match="--base"):
        run(source, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    (path,) = run(source, tmp_path / "x.safetensors", "--base", tmp_path / "vae")
    ours, theirs = files.read(path)[0], files.read(wanted)[0]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = tmp_path / "vae" / "config.json"  # the same shapes in FLUX.1's units: not the VAE of the release
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": 0.1159, "scaling_factor": 0.3611}))
    with pytest.raises(CheckpointError, match=r"holds the VAE of FLUX\.1 \(told by its metadata\).*that of SD3"):
        run(source, tmp_path / "y.safetensors", "--base", tmp_path / "vae")


def test_a_wrong_order_of_channels_is_found(
    tmp_path: Path, run, kl: AutoencoderKL, trained: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(release.autoencoder_state(trained, kl), tmp_path / "pytorch_model.bin")
    release.write_statistics(tmp_path)
    monkeypatch.setattr(authors_autoencoder, "_base_first", lambda state, *_: state)
    with pytest.raises(CheckpointError, match=r"the image of pytorch_model\.bin differs by"):
        run(tmp_path, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# Adapter


@pytest.fixture
def base_file(tmp_path: Path, run, transformer: SD3Transformer2DModel) -> Path:
    transformer.save_pretrained(tmp_path / "base")
    (path,) = run(tmp_path / "base", tmp_path / "base.safetensors")
    return path


def predicted(base: Path, adapter: Path, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The adapted model's prediction for [base, detail]."""
    state = merge(files.read(base)[0], load_adapter(adapter))
    model = MMDiT(MMDiTConfig.from_state_dict(state))
    model.load_state_dict(state)
    return model.eval()(*given)


@pytest.mark.parametrize("alpha", [4, 6])
def test_predictions_of_the_adapted_model_stay(
    tmp_path: Path, run, base_file: Path, inputs, theirs: Predict, alpha: int
) -> None:
    model = release.adapt(models.make_transformer(), alpha=alpha)
    folder = tmp_path / "run" / "tokenizer_checkpoints"
    folder.mkdir(parents=True)
    torch.save(release.checkpoint(model), folder / "latest.pt")
    model.save_lora_adapter(tmp_path / "run" / "lora_weights" / "lora_step_7")
    statistics = release.write_statistics(tmp_path)
    settings = (
        "--base",
        base_file,
        "--statistics",
        statistics,
        "--size",
        2048,
        "--shift",
        4,
        "--cfg",
        2.5,
        "--steps",
        30,
    )
    (path,) = run(tmp_path / "run", tmp_path / "adapter.safetensors", *settings)
    adapter = load_adapter(path)
    assert (adapter.config.latent.detail_mean, adapter.config.latent.detail_std) == (release.MEAN, release.STD)
    assert (adapter.config.recommended.size, adapter.config.recommended.shift) == (2048, 4.0)
    x, *rest = inputs(32)
    wanted = theirs(model, swapped(x, 16), *rest)
    assert torch.allclose(predicted(base_file, path, (x, *rest)), swapped(wanted, 16), atol=1e-4)
    assert (wanted[:, 16:] - theirs(models.make_transformer(), x[:, :16], *rest)).abs().max() > 1e-2


def test_the_running_average_is_taken_where_there_is_one(
    tmp_path: Path, run, base_file: Path, inputs, theirs: Predict
) -> None:
    model = release.adapt(models.make_transformer())
    content = release.checkpoint(model)
    content["model_state_dict"] = {name: tensor.clone() for name, tensor in content["model_state_dict"].items()}
    model.save_lora_adapter(tmp_path / "lora")
    x, *rest = inputs(32)
    last = theirs(model, swapped(x, 16), *rest)
    for name, tensor in model.named_parameters():  # the average is another point than the last step
        if name in {key.removeprefix("transformer.transformer.") for key in release.trained_parameters(model)}:
            tensor *= 0.8
    content["ema_state_dict"] = release.trained_parameters(model)
    average = theirs(model, swapped(x, 16), *rest)
    torch.save(content, tmp_path / "latest.pt")
    release.write_statistics(tmp_path)
    for name, wanted in (("auto", average), ("average", average), ("last", last)):
        options = ("--base", base_file, "--lora", tmp_path / "lora", "--weights", name)
        (path,) = run(tmp_path / "latest.pt", tmp_path / f"{name}.safetensors", *options)
        assert torch.allclose(predicted(base_file, path, (x, *rest)), swapped(wanted, 16), atol=1e-4), name


def test_an_adapter_of_the_release_has_to_fit_the_base_model(tmp_path: Path, run, base_file: Path) -> None:
    model = release.adapt(models.make_transformer())
    torch.save(release.checkpoint(model), tmp_path / "latest.pt")
    release.write_statistics(tmp_path)
    with pytest.raises(CheckpointError, match="--lora none"):
        run(tmp_path / "latest.pt", tmp_path / "x.safetensors", "--base", base_file)
    with pytest.raises(CheckpointError, match="--base"):
        run(tmp_path / "latest.pt", tmp_path / "x.safetensors")
    other = files.read(base_file)[0]
    other["pos_embed"] = other["pos_embed"] + 1
    files.save(tmp_path / "other.safetensors", other, {})
    with pytest.raises(CheckpointError, match="other positions"):
        run(
            tmp_path / "latest.pt",
            tmp_path / "x.safetensors",
            "--base",
            tmp_path / "other.safetensors",
            "--lora",
            "none",
        )
    assert not (tmp_path / "x.safetensors").exists()


def test_the_command_says_what_it_saw(
    tmp_path: Path, kl: AutoencoderKL, trained: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(release.autoencoder_state(trained, kl), tmp_path / "pytorch_model.bin")
    release.write_statistics(tmp_path)
    convert.main([str(tmp_path), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "the autoencoder of the authors' SD3 release" in said
    assert "16 base + 16 detail channels, detail trunk its own" in said
    assert "differ by" in said and "autoencoder.safetensors" in said
