"""The perceptual distances: the numbers of the original, safe to train with, and clear where something is missing."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from torch import nn

from davae_core.errors import DAVAEError, LatentError
from davae_core.perceptual import PerceptualDistance, PerceptualName, load_perceptual

INSTALLED = importlib.util.find_spec("stlpips_pytorch") is not None
weights = pytest.mark.skipif(not INSTALLED, reason="needs pip install --no-deps stlpips_pytorch==0.0.2")

# By the package stlpips_pytorch 0.0.2 itself (variant "shift_tolerant"), on the images below.
GOLDEN = {
    ("st-lpips-alex", "other"): 0.0955729,
    ("st-lpips-alex", "shifted"): 0.0089422,
    ("st-lpips-alex", "dark"): 0.0301127,
    ("st-lpips-vgg", "other"): 0.2007652,
    ("st-lpips-vgg", "shifted"): 0.0426563,
    ("st-lpips-vgg", "dark"): 0.0073865,
}


def pattern(height: int, width: int, step: int) -> torch.Tensor:
    """An image ``[1, 3, height, width]`` in [-1, 1] by integer arithmetic: texture, blocks and stripes."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    texture = (y * y + step * x + x * y) % 61 / 30 - 1
    blocks = (y // 8 + x // 6 + step) % 3 - 1
    stripes = (x * step + 2 * y) % 17 / 8 - 1
    return torch.stack([plane.float() for plane in (texture, blocks, stripes)])[None]


IMAGE = pattern(48, 64, 3)
CHANGED = {"other": pattern(48, 64, 7), "shifted": IMAGE.roll(1, -1), "dark": IMAGE * 0.5 - 0.5}


@pytest.fixture(scope="module")
def metric() -> Callable[[PerceptualName], PerceptualDistance]:
    """Each metric, loaded once."""
    loaded: dict[str, PerceptualDistance] = {}

    def get(name: PerceptualName = "st-lpips-alex") -> PerceptualDistance:
        if name not in loaded:
            loaded[name] = load_perceptual(name)
        return loaded[name]

    return get


@weights
@pytest.mark.parametrize(("name", "change"), GOLDEN)
def test_st_lpips_gives_the_numbers_of_its_authors(
    metric: Callable[[str], PerceptualDistance], name: str, change: str
) -> None:
    assert metric(name)(IMAGE, CHANGED[change]).item() == pytest.approx(GOLDEN[name, change], abs=1e-5)


@weights
def test_the_package_is_read_and_not_imported() -> None:
    before = set(sys.modules)
    load_perceptual("st-lpips-alex")
    imported = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not {"stlpips_pytorch", "torchvision", "IPython", "torchsummary"} & imported


@weights
def test_each_pair_of_a_batch_has_its_own_distance(metric: Callable[[], PerceptualDistance]) -> None:
    pairs = list(CHANGED.values())
    together = metric()(IMAGE.expand(3, -1, -1, -1), torch.cat(pairs))
    assert together.shape == (3,)
    torch.testing.assert_close(together, torch.cat([metric()(IMAGE, other) for other in pairs]))


@weights
def test_equal_images_are_at_distance_zero_and_order_does_not_matter(metric: Callable[[], PerceptualDistance]) -> None:
    other = CHANGED["other"]
    assert metric()(IMAGE, IMAGE).item() == 0
    assert metric()(IMAGE, other).item() == pytest.approx(metric()(other, IMAGE).item(), rel=1e-5)


@weights
def test_it_teaches_an_image_to_come_nearer(metric: Callable[[], PerceptualDistance]) -> None:
    target = CHANGED["other"]
    with torch.enable_grad():
        x = IMAGE.clone().requires_grad_()
        before = metric()(x, target).sum()
        (gradient,) = torch.autograd.grad(before, x)
    step = 0.05 * gradient / gradient.abs().max()
    assert metric()(IMAGE - step, target).item() < before.item()


@weights
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_the_gradient_is_finite_where_images_are_flat_or_equal(
    metric: Callable[[], PerceptualDistance], value: float
) -> None:
    flat = torch.full((1, 3, 32, 32), value)
    with torch.enable_grad():
        for target in (flat, IMAGE[..., :32, :32]):
            x = flat.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(metric()(x, target).sum(), x)
            assert gradient.isfinite().all()


@weights
def test_it_cannot_be_trained_and_stays_in_eval_mode(metric: Callable[[], PerceptualDistance]) -> None:
    holder = nn.Sequential(metric()).train()
    assert holder.training
    assert not any(module.training for module in metric().modules())
    assert not any(parameter.requires_grad for parameter in holder.parameters())


@weights
def test_autocast_changes_little_and_gives_float32(metric: Callable[[], PerceptualDistance]) -> None:
    a, b = (image[..., :24, :24] for image in (IMAGE, CHANGED["other"]))
    with torch.autocast("cpu", torch.bfloat16):
        low = metric()(a.bfloat16(), b.bfloat16())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(metric()(a, b).item(), rel=0.03)


@weights
def test_the_memory_format_does_not_matter() -> None:
    metric, other = load_perceptual("st-lpips-alex"), CHANGED["other"]
    expected = metric(IMAGE, other)
    metric.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = [image.to(memory_format=torch.channels_last) for image in (IMAGE, other)]
    torch.testing.assert_close(metric(*last), expected, rtol=1e-5, atol=1e-6)


@weights
@pytest.mark.parametrize("name", ["st-lpips-alex", "st-lpips-vgg"])
def test_the_smallest_side_works_and_one_less_is_refused(
    metric: Callable[[str], PerceptualDistance], name: str
) -> None:
    side = metric(name).smallest
    assert side < 64
    assert metric(name)(IMAGE[..., :side, :side], CHANGED["dark"][..., :side, :side]) > 0
    small = IMAGE[..., : side - 1, :40]
    with pytest.raises(LatentError, match=rf"at least {side} px a side; given 40 x {side - 1}"):
        metric(name)(small, small)


@weights
@pytest.mark.parametrize("shape", [(1, 3, 48, 48), (1, 1, 48, 64), (3, 48, 64)])
def test_images_of_another_shape_are_named(metric: Callable[[], PerceptualDistance], shape: tuple[int, ...]) -> None:
    with pytest.raises(LatentError, match=r"one shape; given \[1, 3, 48, 64\]"):
        metric()(IMAGE, torch.zeros(shape))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DAVAEError, match=r"'lpips'.*st-lpips-alex, st-lpips-vgg, lpips-alex, lpips-vgg"):
        load_perceptual("lpips")  # type: ignore[arg-type]


def test_without_the_package_the_message_says_how_to_get_it_and_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(DAVAEError) as caught:
        load_perceptual("st-lpips-alex")
    assert "not installed: pip install --no-deps stlpips_pytorch==0.0.2" in str(caught.value)
    assert "never to be reported as LPIPS" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"\x80\x02]."])
def test_missing_or_damaged_weights_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    package = tmp_path / "stlpips_pytorch"
    weights_folder = package / "weights" / "vST0.0"
    weights_folder.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not run')")
    if content is not None:
        (weights_folder / "alex_shift_tolerant.pth").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    message = "installed without them" if content is None else r"alex_shift_tolerant\.pth does not hold"
    with pytest.raises(DAVAEError, match=message):
        load_perceptual("st-lpips-alex")


def test_weights_of_the_other_network_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "stlpips_pytorch" / "weights" / "vST0.0"
    folder.mkdir(parents=True)
    (tmp_path / "stlpips_pytorch" / "__init__.py").touch()
    torch.save({"net.slice1.0.weight": torch.zeros(64, 3, 3, 3)}, folder / "alex_shift_tolerant.pth")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DAVAEError, match="does not hold the st-lpips-alex weights"):
        load_perceptual("st-lpips-alex")


def test_without_lpips_the_message_says_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        """A finder that knows no lpips, whether or not it is installed."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if name == "lpips":
                raise ModuleNotFoundError("No module named 'lpips'")
            return None

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    with pytest.raises(DAVAEError, match=r"pip install lpips.*st-lpips-alex works offline"):
        load_perceptual("lpips-alex")
