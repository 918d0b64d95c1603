import os
import random
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from davae_core.errors import DAVAEError
from davae_core.training.data.batches import Draw
from davae_core.training.data.config import DataConfig
from davae_core.training.data.cutting import covering, crop, nearest_shape, shapes, shrunk
from davae_core.training.data.dataset import ImageData, loader
from davae_core.training.data.listing import examined
from davae_core.training.data.sources import index

Batch = dict[str, Any]


def paint(path: Path, number: int, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".json").write_text(f'{{"caption": ["{number} a", "{number} b", "{number} c"]}}')


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of many shapes."""
    path = tmp_path_factory.mktemp("collection")
    dice = random.Random(0)
    for i in range(20):
        paint(path / f"{i:02d}.png", i, (dice.randint(20, 90), dice.randint(20, 90)))
    return path


@pytest.fixture
def config(collection: Path) -> DataConfig:
    return DataConfig(images=(str(collection),), size=32, random_crop=True, workers=0, enlarge=True)


def load(config: DataConfig, batch: int = 6, **options: Any) -> list[Batch]:
    return list(loader(config, batch, 0, 8, **{"steps": 9, **options}))


def same(ones: list[Batch], others: list[Batch]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    return len(ones) == len(others) and all(
        one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        for one, other in zip(ones, others)
    )


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_with_exactly_the_same_batches(
    config: DataConfig, workers: int, buckets: bool
) -> None:
    config = replace(config, buckets=buckets)
    whole = load(config)
    assert [batch["step"] for batch in whole] == list(range(9))
    for start in (0, 1, 5, 9):
        assert same(load(replace(config, workers=workers), start=start), whole[start:])


def test_batches_differ_between_steps_and_seeds(config: DataConfig) -> None:
    batches = [*load(config), *loader(config, 6, 1, 8, steps=9)]
    assert len({batch["image"].numpy().tobytes() for batch in batches}) == 18


@pytest.mark.parametrize("buckets", [False, True])
def test_the_shares_of_all_processes_and_their_parts_make_up_the_batch(config: DataConfig, buckets: bool) -> None:
    config = replace(config, buckets=buckets)
    whole = load(config, batch=12)
    for world, micro in [(1, 4), (2, 6), (2, 3), (3, 1), (4, None), (5, 2)]:
        shares = [load(config, batch=12, rank=rank, world=world, micro_batch=micro) for rank in range(world)]
        for step, expected in enumerate(whole):
            mine = [[part for part in share if part["step"] == step] for share in shares]
            assert len({len(share) for share in mine}) == 1
            assert all(part["micros"] == len(share) for share in mine for part in share)
            assert sum(part["share"] for share in mine for part in share) == pytest.approx(world)
            parts = [part for share in mine for part in share if part["share"]]
            assert torch.equal(torch.cat([part["image"] for part in parts]), expected["image"])
            assert torch.cat([part["position"] for part in parts]).tolist() == expected["position"].tolist()
            assert [name for part in parts for name in part["name"]] == expected["name"]
            assert [caption for part in parts for caption in part["caption"]] == expected["caption"]


@pytest.mark.parametrize("wrong", [{"rank": 1}, {"world": 0}, {"batch": 0}, {"micro_batch": 0}])
def test_what_cannot_be_divided_at_all_is_refused_before_anything_is_looked_for(wrong: dict[str, int]) -> None:
    with pytest.raises(DAVAEError, match="cannot be divided"):
        loader(DataConfig(("nowhere",)), seed=0, multiple=8, steps=1, **{"batch": 6, **wrong})  # type: ignore[arg-type]


def test_every_image_is_seen_in_every_epoch(config: DataConfig) -> None:
    names = [name for batch in load(config, batch=5, steps=8) for name in batch["name"]]
    assert Counter(names) == dict.fromkeys((source.name for source in index(config.images)), 2)


def test_images_are_what_the_files_hold(tmp_path: Path) -> None:
    paint(tmp_path / "x.png", 0, (16, 16))
    (batch,) = load(DataConfig((str(tmp_path),), size=16, flip=False, workers=0), batch=1, steps=1)
    expected = np.asarray(Image.open(tmp_path / "x.png")).transpose(2, 0, 1)
    assert (batch["image"].dtype, batch["image"].shape) == (torch.float32, (1, 3, 16, 16))
    assert np.array_equal(((batch["image"][0] + 1) * 127.5).round().numpy(), expected)
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1
    assert batch["caption"][0] in ("0 a", "0 b", "0 c")


def test_all_captions_of_an_image_come_up(config: DataConfig) -> None:
    seen = {caption for batch in load(config, batch=20, steps=40) for caption in batch["caption"]}
    assert seen == {f"{number} {letter}" for number in range(20) for letter in "abc"}


def test_half_of_the_images_are_flipped_and_each_now_and_then(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(16, dtype=np.uint8)[None, :, None], (16, 1, 3))
    for i in range(4):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    config = DataConfig((str(tmp_path),), size=16, workers=0)
    flips = {
        (name, bool(image[0, 0, 0] > image[0, 0, -1])): None
        for batch in load(config, batch=4, steps=20)
        for name, image in zip(batch["name"], batch["image"])
    }
    share = np.mean([float(i[0, 0, 0] > i[0, 0, -1]) for b in load(config, batch=4, steps=100) for i in b["image"]])
    assert len(flips) == 8
    assert abs(share - 0.5) < 0.1
    assert all((batch["image"][:, 0, 0, 0] == -1).all() for batch in load(replace(config, flip=False), batch=4))


def test_crops_are_central_or_reach_both_ends(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (16, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "x.png")
    config = DataConfig((str(tmp_path),), size=16, flip=False, workers=0)

    def starts(config: DataConfig) -> set[int]:
        lefts = [batch["image"][:, 0, 0, 0] for batch in load(config, batch=1, steps=400)]
        return {round(float(left + 1) * 127.5) for left in torch.cat(lefts)}

    assert starts(config) == {12}
    assert starts(replace(config, random_crop=True)) == set(range(25))


@pytest.mark.parametrize("case", range(40))
def test_any_image_covers_any_shape_and_little_is_lost(case: int) -> None:
    dice = random.Random(case)
    size = dice.randint(1, 120), dice.randint(1, 120)
    shape = 8 * dice.randint(1, 10), 8 * dice.randint(1, 10)
    width, height = covering(size, shape)
    assert width >= shape[0]
    assert height >= shape[1]
    assert width == shape[0] or height == shape[1]
    scale = max(shape[0] / size[0], shape[1] / size[1])
    assert abs(width - size[0] * scale) <= 1
    assert abs(height - size[1] * scale) <= 1
    assert crop(shrunk(Image.new("RGB", size), shape), shape, 0, 0).size == shape


@pytest.mark.parametrize("size", [(40, 60), (500, 90), (90, 500)])
def test_a_crop_is_that_of_the_whole_image_scaled(size: tuple[int, int]) -> None:
    shape = (64, 48)
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / 9
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1) * 100 + 128
    image = Image.fromarray(waves.astype(np.uint8))
    whole = covering(size, shape)
    left, top = (whole[0] - shape[0]) // 2, (whole[1] - shape[1]) // 3
    scaled = image.resize(whole, Image.Resampling.BICUBIC if whole[0] > size[0] else Image.Resampling.LANCZOS)
    expected = np.asarray(scaled.crop((left, top, left + shape[0], top + shape[1]))).astype(int)
    found = np.asarray(crop(shrunk(image, shape), shape, left, top)).astype(int)
    assert np.abs(found - expected).max() <= 2


def test_a_long_thin_picture_costs_its_crop(tmp_path: Path) -> None:
    Image.new("L", (40, 6000), 9).save(tmp_path / "x.png")
    config = DataConfig((str(tmp_path),), size=1024, enlarge=True, random_crop=True, workers=0)
    source = examined(index(config.images)[0])
    assert not isinstance(source, str)
    data = ImageData([source], [(1024, 1024)], [0], config)
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert data[Draw(0, 0, 0, 0, 1)]["image"].shape == (3, 1024, 1024)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB; whole it would be 470 MB


def test_shrinking_does_not_alias() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (512, 256, 3))
    small = np.asarray(shrunk(Image.fromarray(stripes), (64, 64))).astype(int)
    assert np.abs(small[4:-4, 4:-4] - 127).max() <= 2


@pytest.mark.parametrize("size", [256, 512, 1000, 1024, 2048])
@pytest.mark.parametrize("multiple", [8, 16, 32, 64])
def test_bucket_shapes_are_multiples_of_nearly_the_same_area(size: int, multiple: int) -> None:
    found = shapes(size, multiple, buckets=True)
    assert found == sorted({(h, w) for w, h in found})
    assert all(w % multiple == h % multiple == 0 for w, h in found)
    assert all(w * h <= size**2 for w, h in found)
    assert all(0.5 <= w / h <= 2 for w, h in found)
    assert all(w * h > (size - multiple) * (size - 2 * multiple) * 0.9 for w, h in found)
    assert max(w / h for w, h in found) > 1.5
    side = size // multiple * multiple
    assert (side, side) in found


def test_the_buckets_of_one_megapixel_are_dense() -> None:
    ratios = [w / h for w, h in shapes(1024, 32, buckets=True)]
    assert len(ratios) >= 15
    assert max(b / a for a, b in zip(sorted(ratios), sorted(ratios)[1:])) < 1.11


@pytest.mark.parametrize("case", range(30))
def test_an_image_goes_to_the_shape_that_crops_it_least(case: int) -> None:
    dice = random.Random(case)
    among = shapes(512, 32, buckets=True)
    size = dice.randint(100, 3000), dice.randint(100, 3000)

    def kept(shape: tuple[int, int]) -> float:
        ratio = size[0] / size[1] / (shape[0] / shape[1])
        return min(ratio, 1 / ratio)

    assert kept(among[nearest_shape(size, among)]) == pytest.approx(max(map(kept, among)))


def test_a_square_that_is_no_multiple_is_refused_with_the_nearest_ones() -> None:
    assert shapes(64, 32, buckets=False) == [(64, 64)]
    with pytest.raises(DAVAEError, match="use 992 or 1024"):
        shapes(1000, 32, buckets=False)
    with pytest.raises(DAVAEError, match="use 32 "):
        shapes(20, 32, buckets=False)
    with pytest.raises(DAVAEError, match="below 32"):
        shapes(20, 32, buckets=True)


def test_with_buckets_a_batch_has_one_shape_and_images_keep_their_ratio(config: DataConfig) -> None:
    sizes = {source.name: Image.open(source.file).size for source in index(config.images)}
    ratios = {name: width / height for name, (width, height) in sizes.items()}
    among = shapes(64, 8, buckets=True)
    seen = set()
    for batch in load(replace(config, size=64, buckets=True), batch=2, steps=60):
        shape = batch["image"].shape[3], batch["image"].shape[2]
        seen.add(shape)
        for name in batch["name"]:
            assert among[nearest_shape((round(ratios[name] * 10**6), 10**6), among)] == shape
    assert len(seen) == 5


def test_the_cache_changes_nothing_and_reads_each_image_once(config: DataConfig, tmp_path: Path) -> None:
    expected = load(config)
    for source in index(config.images):
        (tmp_path / Path(source.name).name).write_bytes(Path(source.name).read_bytes())
        beside = Path(source.name).with_suffix(".json")
        (tmp_path / beside.name).write_bytes(beside.read_bytes())
    batches = iter(loader(replace(config, images=(str(tmp_path),), cache=True, workers=2), 6, 0, 8, steps=9))
    found = [next(batches) for _ in range(4)]  # 4 x 6 > 20: a whole epoch
    for path in tmp_path.glob("*.png"):
        path.unlink()
    found += batches
    assert [[Path(name).name for name in batch["name"]] for batch in found] == [
        [Path(name).name for name in batch["name"]] for batch in expected
    ]
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(found, expected, strict=True))


def with_broken(path: Path, broken: set[int], count: int = 8) -> DataConfig:
    for i in range(count):
        paint(path / f"{i}.png", i, (24, 20))
        if i in broken:
            (path / f"{i}.png").write_bytes((path / f"{i}.png").read_bytes()[:-600])
    return DataConfig((str(path),), size=16, flip=False, workers=0, enlarge=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buckets", [False, True])
def test_a_broken_image_is_named_once_and_replaced_by_its_neighbour(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, buckets: bool
) -> None:
    config = replace(with_broken(tmp_path, {2, 3, 7}), workers=workers, buckets=buckets)
    batches = load(config, batch=4, steps=6)
    broken = [Path(name).stem for batch in batches for name in batch["broken"]]
    assert sorted(broken) == ["2", "3", "7"]
    assert all(caplog.text.count(f"could not read {tmp_path}/{name}.png") == 1 for name in broken)
    for first in (0, 2, 4):
        names = Counter(Path(name).stem for batch in batches[first : first + 2] for name in batch["name"])
        assert names == {"0": 2, "1": 1, "4": 3, "5": 1, "6": 1}
    assert all(
        caption.split()[0] == Path(name).stem
        for batch in batches
        for name, caption in zip(batch["name"], batch["caption"])
    )


def test_a_broken_image_is_replaced_by_one_of_its_own_bucket(tmp_path: Path) -> None:
    for i in range(6):
        paint(tmp_path / f"{i}.png", i, (48, 24) if i % 2 else (24, 48))
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:-600])
    config = DataConfig((str(tmp_path),), size=32, buckets=True, workers=0, enlarge=True)
    batches = load(config, batch=3, steps=2)
    names = {tuple(batch["image"].shape[2:]): sorted(Path(n).stem for n in batch["name"]) for batch in batches}
    assert names == {(40, 24): ["0", "4", "4"], (24, 40): ["1", "3", "5"]}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_stop_the_training_and_are_named(tmp_path: Path, workers: int) -> None:
    config = replace(with_broken(tmp_path, {1, 4, 5}), workers=workers)
    assert len(load(replace(config, max_broken=3), batch=8)) == 9
    with pytest.raises(DAVAEError, match=r"3 of 8 images could not be read: .*1\.png: .*truncated; .*4\.png.*5\.png"):
        load(replace(config, max_broken=2), batch=8)


def test_nothing_is_given_out_when_all_images_are_broken(tmp_path: Path) -> None:
    config = with_broken(tmp_path, set(range(3)), count=3)
    with pytest.raises(DAVAEError, match="3 of 3 images"):
        next(iter(loader(config, 1, 0, 8, steps=1)))


def test_a_broken_image_in_a_shard_does_not_disturb_its_neighbours(tmp_path: Path) -> None:
    with_broken(tmp_path, {1}, count=3)
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(tmp_path.glob("?.png")):
            tar.add(path, path.name)
    batches = load(DataConfig((str(shard),), size=16, flip=False, workers=0), batch=3, steps=1)
    assert list(batches[0]["broken"]) == [f"{shard}/1.png"]
    assert sorted(batches[0]["name"]) == [f"{shard}/0.png", f"{shard}/2.png", f"{shard}/2.png"]


def test_an_image_depends_on_its_draw_alone(config: DataConfig) -> None:
    found = [source for source in map(examined, index(config.images)) if not isinstance(source, str)]
    data = ImageData(found, [(32, 32)], [0] * len(found), config)
    draws = [Draw(3, 0, 0, 0, seed) for seed in range(16)]
    once = [data[draw]["image"] for draw in draws]
    assert all(torch.equal(data[draw]["image"], image) for draw, image in zip(reversed(draws), reversed(once)))
    assert len({image.numpy().tobytes() for image in once}) > 4


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(config: DataConfig, workers: int) -> None:
    before = torch.get_rng_state()
    load(replace(config, workers=workers), steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_shards_give_the_same_training_as_the_folder_they_came_from(config: DataConfig, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted(Path(config.images[0]).iterdir()):
            tar.add(path, path.name)
    shards = load(replace(config, images=(str(tmp_path / "all.tar"),), workers=2))
    for one, other in zip(shards, load(config), strict=True):
        assert torch.equal(one["image"], other["image"])
        assert one["caption"] == other["caption"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loading_survives_signals_that_reach_all_processes(config: DataConfig, number: signal.Signals) -> None:
    program = f"""
import os, signal
from davae_core.training.data.config import DataConfig
from davae_core.training.data.dataset import loader
signal.signal({int(number)}, lambda *_: None)
batches = iter(loader(DataConfig(({config.images[0]!r},), size=16, workers=2), 4, 0, 8, steps=40))
steps = [next(batches)["step"]]
os.killpg(0, {int(number)})
print(steps + [batch["step"] for batch in batches] == list(range(40)))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_every_setting_is_explained_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(DataConfig, args=["--help"])
    shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for said in (
        "000..012",
        "square root",
        "aspect ratio",
        "random place",
        "Mirror",
        "Processes",
        "in memory",
        "named",
    ):
        assert said in shown
    read = tyro.cli(DataConfig, args=["--images", "a", "b", "--size", "64"])
    assert (read.images, read.size) == (("a", "b"), 64)


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"size": 0}, {"workers": -1}, {"max_broken": -1}):
        with pytest.raises(DAVAEError, match="at least 1"):
            DataConfig(images=("x",), **wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images in 24 shards."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(24):
        with tarfile.open(folder / f"train-{number:03d}.tar", "w") as tar:
            for i in range(4):
                picture = folder / f"{number:03d}_{i}.png"
                Image.new("RGB", (8, 8), (number, i, 0)).save(picture)
                tar.add(picture, picture.name)
                picture.unlink()
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_workers_together_see_every_image_of_all_shards_once_an_epoch(many_shards: Path, world: int) -> None:
    config = DataConfig((str(many_shards / "train-{000..023}.tar"),), size=8, workers=2)
    per_epoch = 96 // 12

    def names(start: int, steps: int) -> list[str]:
        parts = [
            loader(config, 12, 0, 8, start=start, steps=steps, rank=rank, world=world, micro_batch=2)
            for rank in range(world)
        ]
        return [name for part in parts for batch in part for name in batch["name"]]

    everything = {f"{many_shards}/train-{n:03d}.tar/{n:03d}_{i}.png" for n in range(24) for i in range(4)}
    begun = names(per_epoch, per_epoch + 3)
    rest = names(per_epoch + 3, 2 * per_epoch)  # of a run that was stopped in the middle of the second epoch
    assert Counter(begun) + Counter(rest) == dict.fromkeys(everything, 1)
    assert len(begun) == 3 * 12
