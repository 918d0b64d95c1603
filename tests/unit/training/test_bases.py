"""Stage 1 on each layout of base VAE: two steps, and what the file holds; which units it is trained in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from davae_core import bases, checkpoints
from davae_core.autoencoder import Autoencoder
from davae_core.checkpoints import files
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError, DAVAEError
from davae_core.training import recipes
from davae_core.training import stages as entry
from davae_core.training.data import dataset
from davae_core.training.data.config import DataConfig
from davae_core.training.objective import start_certain
from davae_core.training.pretrained import base_of_file
from davae_core.training.pretrained import base_vae as load
from davae_core.training.recipes.imagenet import IMAGENET_F32C128
from davae_core.training.run import launch
from davae_core.training.run.config import from_command_line
from davae_core.training.tasks import autoencoder
from davae_core.training.tasks.base_autoencoder import scaled
from harness.layouts import DETAIL, LAYOUTS, random_vae

CASES = [(layout, scale) for layout in LAYOUTS for scale in (2, 4)]
SIZE = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for i in range(2):
        pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def write(vae: Autoencoder, path: Path, family: str = "") -> Path:
    files.save(path, vae.state_dict(), {bases.BASE_KEY: family} if family else {})
    return path


Train = Callable[..., Path]


@pytest.fixture
def train(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """``train(recipe, base, steps, *options, size=SIZE)``: a DA-VAE file."""
    monkeypatch.setattr(launch, "SURVEY_STEPS", 1)
    monkeypatch.setattr(launch, "SURVEY_BATCH", 4)

    def run(recipe: str, base: Path, steps: int, *options: str, size: int = SIZE) -> Path:
        out = tmp_path / "out"
        command = f"{recipe} --data.images {images} --data.size {size} --data.workers 0 --run.out {out} --base {base} "
        command += "--data.enlarge "
        command += f"--run.steps {steps} --run.batch 2 --run.sample-every 0 --optimiser.warmup 0 --losses.perceptual 0"
        assert entry.run("autoencoder", [*command.split(), *options]) == 0
        return out / recipes.AUTOENCODER[recipe][1].file

    return run


@pytest.mark.parametrize(("layout", "scale"), CASES)
def test_two_steps_on_each_base(train: Train, images: Path, tmp_path: Path, layout: str, scale: int) -> None:
    vae = random_vae(layout)
    # SD1 and SDXL have the same shapes: once the option says which it is, once the file.
    told = layout == "sd1" and scale == 4
    base = write(vae, tmp_path / "base.safetensors", "sdxl" if told else "")
    options = ["--family", "sd1"] if layout == "sd1" and not told else []
    options += ["--detail-channels", str(DETAIL[layout]), "--scale", str(scale)]
    channels, factor = vae.config.latent_channels, vae.config.factor * scale
    model = checkpoints.load_autoencoder(train("micro", base, 2, *options, size=max(SIZE, factor)))
    assert model.config.base == vae.config
    assert (model.latent.detail_channels, model.latent.scale, model.latent.factor) == (DETAIL[layout], scale, factor)
    with torch.no_grad():
        x = torch.rand(1, 3, factor, 2 * factor) * 2 - 1
        z = model.encode(x)
        assert z.shape == (1, channels + DETAIL[layout], 1, 2)
        assert torch.equal(z[:, :channels], vae.encode(model.shrink(x)))
        image = model.decode(z)
        assert image.shape == x.shape and image.isfinite().all()
        assert torch.equal(model.decode_base(z[:, :channels]), vae.decode(z[:, :channels]))
    untrained = vae.decoder.state_dict(prefix="decoder.")
    assert not any(torch.equal(t, untrained[n]) for n, t in model.state_dict().items() if n in untrained)
    units = {"sd3": (0.0609, 1.5305), "sd1": (0.0, 0.13025 if told else 0.18215)}
    if layout in units:
        assert (model.latent.base_shift, model.latent.base_scale) == units[layout]
    else:
        assert_measured(model, images)


@torch.no_grad()
def assert_measured(model: DAVAE, folder: Path) -> None:
    """The units are those in which the training images' base latents have mean 0 and standard deviation 1."""
    factor = model.latent.factor
    recipe = DataConfig((str(folder),), size=max(SIZE, factor), workers=0, enlarge=True)
    loader = dataset.loader(recipe, batch=4, seed=0, multiple=factor, steps=1)
    z = torch.cat([model.latent.normalise_base(model.encode_base(batch["image"])) for batch in loader])
    # Two images differ little in some channels, beside what they have in common, and are encoded here in one batch.
    assert z.mean(dim=(0, 2, 3)).abs().max() <= 1e-2
    assert (z.std(dim=(0, 2, 3), correction=0) - 1).abs().max() <= 1e-2


def test_the_imagenet_recipe_trains_all_its_parts(train: Train, tmp_path: Path) -> None:
    base = write(random_vae("vavae"), tmp_path / "base.safetensors")
    options = ["--critic.start", "1", "--critic.width", "8", "--critic.layers", "1", "--optimiser.lr", "1e-3"]
    model = checkpoints.load_autoencoder(train("imagenet_f32c128", base, 2, *options))
    assert not model.config.shared_trunk
    assert (model.latent.base_channels, model.latent.detail_channels, model.latent.factor) == (32, 96, 32)
    own, base_trunk = model.detail_trunk, random_vae("vavae").encoder.state_dict()
    assert own is not None and not torch.equal(own.conv_in.weight, base_trunk["conv_in.weight"])
    assert torch.equal(model.base_encoder.conv_in.weight, base_trunk["conv_in.weight"])


def test_the_imagenet_recipe_is_the_papers() -> None:
    recipe = IMAGENET_F32C128
    assert from_command_line({"a": ("", recipe)}, "", ["a"]) == recipe
    assert (recipe.detail_channels, recipe.scale, recipe.data.size, recipe.run.batch) == (96, 2, 512, 64)
    assert (recipe.alignment.weight, recipe.alignment.adaptive, recipe.detail_dropout) == (0.5, True, 0.1)
    assert (recipe.critic.weight, recipe.critic.start, recipe.optimiser.lr) == (0.1, 5001, 1e-4)
    assert recipe.train_trunk and (recipe.losses.l1, recipe.losses.perceptual) == (1.0, 1.0)
    # 1e-6 times the mean of twice the divergence of each of 96 x 16 x 16 numbers, for an image whose sum is that.
    assert recipe.losses.kl * 96 * 16 * 16 == pytest.approx(2e-6)


def test_sd1_or_sdxl_has_to_be_said(tmp_path: Path) -> None:
    path = write(random_vae("sd1"), tmp_path / "vae.safetensors")
    config = load(path).config
    with pytest.raises(DAVAEError, match="SD1 / SD2 or of SDXL"):
        base_of_file(path, config)
    assert base_of_file(path, config, "sdxl") is bases.SDXL
    assert base_of_file(write(random_vae("sd1"), path, "sd1"), config) is bases.SD1


def test_the_vae_of_a_whole_checkpoint_serves_too(tmp_path: Path) -> None:
    vae = random_vae("sd1")
    state = {f"first_stage_model.{name}": tensor.half() for name, tensor in vae.state_dict().items()}
    files.save(tmp_path / "sd.safetensors", state | {"model.diffusion_model.x": torch.zeros(1)}, {})
    found = load(tmp_path / "sd.safetensors")
    assert found.config == vae.config
    assert all(torch.equal(t, vae.state_dict()[n].half().float()) for n, t in found.state_dict().items())


def test_a_file_without_a_vae_is_refused_by_name(tmp_path: Path) -> None:
    state = random_vae("sd1").state_dict()
    del state["post_quant_conv.bias"]
    files.save(tmp_path / "half.safetensors", state, {})
    files.save(tmp_path / "none.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"half\.safetensors holds no VAE.*post_quant_conv\.bias"):
        load(tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors holds no VAE.*it is a file of 1 tensors"):
        load(tmp_path / "none.safetensors")


@torch.no_grad()
def test_a_latent_is_scaled_in_the_quant_convs_where_there_are_any() -> None:
    vae, x = random_vae("sd1"), torch.rand(1, 3, 16, 16) * 2 - 1
    other = Autoencoder(vae.config)
    other.load_state_dict(scaled(vae.state_dict(), 0.37))
    z = vae.encode(x)
    assert torch.allclose(other.encode(x), 0.37 * z, atol=1e-6)
    assert torch.allclose(other.decode(0.37 * z), vae.decode(z), atol=1e-5)
    spread = (vae.moments(x).chunk(2, dim=1)[1] / 2).exp()
    assert torch.allclose((other.moments(x).chunk(2, dim=1)[1] / 2).exp(), 0.37 * spread, rtol=1e-5)


@pytest.mark.parametrize(("detail", "scale"), [(4, 2), (8, 4), (16, 4)])
@torch.no_grad()
def test_starting_certain_moves_no_mean(detail: int, scale: int) -> None:
    model = autoencoder.on_base(random_vae("sd1"), detail, scale, train_trunk=False)
    x = torch.rand(1, 3, 8 * scale, 8 * scale)
    before = model.detail_moments(x).chunk(2, dim=1)
    start_certain(model.detail_down.conv)
    after = model.detail_moments(x).chunk(2, dim=1)
    assert torch.equal(after[0], before[0])
    assert torch.allclose(after[1], before[1] - 6, atol=1e-5)
