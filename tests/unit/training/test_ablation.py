"""The ablation bench: that variants are what they say, what the table concludes, and a whole bench at toy size."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from davae_core import checkpoints
from davae_core.adapter import Recommended
from davae_core.errors import DAVAEError
from davae_core.lock import holding
from davae_core.sampling import Sampling
from davae_core.training import __main__ as entry
from davae_core.training import residual
from davae_core.training import stages as known
from davae_core.training.ablation import bench, comparable, table, trainings
from davae_core.training.ablation.budget import BenchConfig, Steps
from davae_core.training.ablation.variants import ABOUT, VARIANTS, chosen
from davae_core.training.data import stored_latents
from davae_core.training.run.task import Batch, Losses
from davae_core.training.tasks import adapter

Runs = dict[int, dict[str, Any]]


@pytest.mark.parametrize("group", ABOUT)
def test_the_variants_of_a_group_are_different_recipes(group: str) -> None:
    first = known.STAGES["autoencoder"].recipes["micro-robust" if group == "decoder" else "micro"][1]
    second = known.STAGES["adapter"].recipes["micro"][1]
    second = replace(second, detail_warmup=500)  # a third of the steps
    made = [
        (
            trainings.changed(first, v.autoencoder),
            trainings.changed(second, v.adapter),
            replace(Sampling(2.5, 2.5), **v.sampling),
            v.residual,
        )
        for v in VARIANTS
        if v.group == group
    ]
    assert len({repr(recipes) for recipes in made}) == len(made) > 1


def test_names_are_unique_and_every_group_has_a_control() -> None:
    assert len({variant.key for variant in VARIANTS}) == len(VARIANTS)
    assert {variant.group for variant in VARIANTS} == set(ABOUT)


def test_a_setting_that_is_not_there_is_named() -> None:
    with pytest.raises(DAVAEError, match="AdapterRecipe has no setting 'detial_factor'"):
        trainings.changed(known.STAGES["adapter"].recipes["micro"][1], {"detial_factor": 2.0})
    with pytest.raises(DAVAEError, match="FlowConfig has no setting 'min_sn'"):
        trainings.changed(known.STAGES["adapter"].recipes["micro"][1], {"flow.min_sn": 5.0})


def test_what_is_chosen_comes_with_its_control() -> None:
    assert [v.key for v in chosen(["decoder/noise-0.5", "latent/d-48"])] == [
        "latent/paper",
        "latent/d-48",
        "decoder/noise-0",
        "decoder/noise-0.5",
    ]
    assert {v.group for v in chosen(["sampling"])} == {"sampling"}
    assert chosen([]) == list(VARIANTS)
    with pytest.raises(DAVAEError, match=r"no variant 'decoder/noise-7'; choose among .*decoder/noise-0\.5"):
        chosen(["decoder/noise-7"])


def runs(*distances: float) -> Runs:
    """Runs by seed, with these perceptual distances."""
    return {
        seed: {"figures": {"st-lpips-alex": value, "psnr": 20.0}, "curve": []} for seed, value in enumerate(distances)
    }


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (runs(0.08, 0.081, 0.079), runs(0.1, 0.1, 0.1), "better"),
        (runs(0.12, 0.125, 0.121), runs(0.1, 0.1, 0.1), "worse"),
        (runs(0.08, 0.12, 0.09), runs(0.1, 0.1, 0.1), "no difference seen"),
        (runs(0.099, 0.07, 0.099), runs(0.1, 0.1, 0.1), "no difference seen"),  # one seed alone makes the mean
        (runs(0.05, 0.05), runs(0.1, 0.1), "too few seeds"),
    ],
)
def test_a_difference_counts_only_beyond_the_spread_of_the_seeds(own: Runs, others: Runs, expected: str) -> None:
    assert table.verdict(own, others) == expected


def test_more_is_better_where_more_is_better() -> None:
    own, others = runs(0.1, 0.1, 0.1), runs(0.1, 0.1, 0.1)
    for seed, value in enumerate((22.0, 22.1, 21.9)):
        own[seed]["figures"]["psnr"] = value
    assert table.verdict(own, others, "psnr") == "better"


def test_seeds_are_compared_in_pairs() -> None:
    """Seeds that differ among themselves more than the variants do hide nothing."""
    assert table.verdict(runs(0.09, 0.19, 0.29), runs(0.1, 0.2, 0.3001)) == "better"


def test_the_table_has_mean_and_spread() -> None:
    told = table.summary(runs(0.1, 0.2, 0.3))
    assert told["st-lpips-alex"] == pytest.approx({"mean": 0.2, "spread": 0.1})
    row = {"about": "it", "seeds": [0, 1, 2], "figures": told, "verdict": ""}
    text = table.markdown({"adapter/paper": row})
    assert "| paper | 3 | 0.2000 ± 0.1000 | 20.00 ± 0.00 |  | it |" in text
    assert table.markdown({}) == "no run is finished\n"


@pytest.fixture(scope="module")
def toy(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> BenchConfig:
    """A bench of the toy family, which is quick."""
    images = tmp_path_factory.mktemp("pictures")
    for part in ("train", "held_out"):
        (images / part).symlink_to(stages.images)
    return BenchConfig(
        images=images,
        out=images / "bench",
        model=stages.file("base_dit"),
        text_encoder=stages.file("base_dit", 1),
        autoencoder=stages.file("autoencoder"),
        adapter=stages.file("adapter"),
        quick=True,
    )


@pytest.fixture(scope="module")
def done(toy: BenchConfig) -> Path:
    """The folder of that bench, run from the command line."""
    names = ("images", "out", "model", "text_encoder", "autoencoder", "adapter")
    options = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(toy, name)))]
    assert entry.main(["ablate", "--quick", *options]) == 0
    return toy.out


def test_a_bench_leaves_a_result_of_each_run_and_a_table(done: Path) -> None:
    told = json.loads((done / "table.json").read_text("utf-8"))
    assert set(told) == {variant.key for variant in chosen(bench.QUICK)}
    assert not list(done.rglob("*.safetensors*")) or all("latents" in str(p) for p in done.rglob("*.safetensors*"))
    result = json.loads((done / "adapter" / "base-ahead" / "0.json").read_text("utf-8"))
    assert [point["step"] for point in result["curve"]] == [2]
    assert result["changes"]["adapter"] == {"detail_factor": 2.0} and result["bench"]["steps"]["adapter"] == 2
    assert {"st-lpips-alex", "psnr", "base_error", "detail_error"} <= result["figures"].keys()
    assert result["weights"]["adapter"] != json.loads((done / "adapter/paper/0.json").read_text())["weights"]["adapter"]
    assert "recon_psnr" in json.loads((done / "latent" / "paper" / "0.json").read_text("utf-8"))["figures"]
    assert "| no-alignment | 1 |" in (done / "table.md").read_text("utf-8")


def test_what_is_finished_is_not_run_again(done: Path, toy: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in done.rglob("[0-9].json")}
    monkeypatch.setattr(bench, "drawings", lambda *_: pytest.fail("measured again"))
    assert bench.bench(toy) == 0
    assert {path: path.read_bytes() for path in done.rglob("[0-9].json")} == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quick": False, "captions": 4}, r"--quick: was True, is False; --captions: was 2, is 4\)"),
        ({"adapter": "other"}, r"--adapter: was davae_tiny_adapter\.safetensors \(\w{8}\), is other\.safetensors"),
        ({"images": "other"}, r"--images: was "),
    ],
)
def test_results_of_other_settings_are_refused_before_anything_is_trained(
    done: Path, toy: BenchConfig, tmp_path: Path, changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoints.load_adapter(toy.adapter)
    other = replace(other, state={name: tensor + 1 for name, tensor in other.state.items()})
    checkpoints.save_adapter(tmp_path / "other.safetensors", other)
    (tmp_path / "train").mkdir()
    places = {"adapter": tmp_path / "other.safetensors", "images": tmp_path}
    given = replace(
        toy, seeds=(5,), variants=("sampling",), **{n: places.get(n, value) for n, value in changed.items()}
    )
    monkeypatch.setattr(bench, "_run", lambda *_: pytest.fail("a run was begun"))
    with pytest.raises(DAVAEError, match=rf"0\.json was made with other settings .*{said}.*another folder \(--out\)"):
        bench.bench(given)


def test_seeds_precision_and_what_a_group_does_not_use_may_differ(done: Path, toy: BenchConfig) -> None:
    told = comparable.settings(replace(bench.quick(toy), seeds=(7,), precision="fp32", compile=True))
    comparable.check(done, chosen(bench.QUICK), told)
    comparable.check(done, chosen(["sampling"]), told | {"steps.adapter": 9, "batch": 9, "held_out": 9})
    with pytest.raises(DAVAEError, match=r"adapter/paper/0\.json .*--steps\.adapter: was 2, is 9"):
        comparable.check(done, chosen(["adapter"]), told | {"steps.adapter": 9})


def test_a_result_of_before_tells_its_numbers() -> None:
    result = {"bench": {"steps": {"adapter": 7}, "captions": 48, "quick": False, "adapter": "a.safetensors"}}
    assert comparable.recorded(result) == {"steps.adapter": 7, "captions": 48, "quick": False}
    assert comparable.recorded({}) == {}


def test_the_table_tells_what_does_not_belong_together(
    done: Path, toy: BenchConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done / "sampling", tmp_path / "sampling")
    asked = replace(toy, out=tmp_path, variants=("sampling/cfg-1.5",), table=True)
    assert bench.bench(asked) == 0 and "warning" not in capsys.readouterr().out
    path = tmp_path / "sampling" / "cfg-1.5" / "0.json"
    told = json.loads(path.read_text("utf-8"))
    told[comparable.KEY]["captions"] = 48
    path.write_text(json.dumps(told), "utf-8")
    assert bench.bench(asked) == 0
    said = capsys.readouterr().out
    assert "| cfg-1.5 | 1 |" in said
    assert "cfg-1.5/0.json cannot be compared with" in said and "--captions: was 2, is 48" in said


def test_the_da_vae_with_a_predictor_inside_is_made_anew_of_other_files(
    toy: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = replace(toy, out=tmp_path), []
    variants = [variant for variant in chosen(["adapter"]) if variant.residual][:1]
    latents = tmp_path / "latents_residual"

    def write(asked: residual.ResidualConfig) -> None:
        made.append(asked.predictor)
        asked.out.write_bytes(b"a DA-VAE")

    monkeypatch.setattr(residual, "write", write)
    monkeypatch.setattr(stored_latents, "compute", lambda asked: asked.out.mkdir(exist_ok=True))
    told = comparable.settings(config)
    for predictor, times in (("one", 1), ("one", 1), ("two", 2)):
        trainings.prepare(config, variants, told | {"predictor": {"name": "p", "hash": predictor}})
        assert len(made) == times
    (latents / "old").write_bytes(b"")
    trainings.prepare(config, variants, told | {"autoencoder": {"name": "a", "hash": "other"}})
    assert len(made) == 3 and not (latents / "old").exists()


def test_a_run_that_another_process_is_at_is_left_to_it(
    done: Path, toy: BenchConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = done / "sampling" / "cfg-1.5" / "0.json"
    kept = result.read_bytes()
    result.unlink()
    (result.parent / "run_0").mkdir()
    with holding(result.parent / "run_0" / ".ablation"):
        assert bench.bench(toy) == 0
    assert "sampling/cfg-1.5, seed 0: another process is at it" in capsys.readouterr().out and not result.exists()
    assert bench.bench(toy) == 0
    again = json.loads(result.read_bytes())
    assert again["figures"] == json.loads(kept)["figures"]


def test_a_bench_that_is_stopped_goes_on(
    toy: BenchConfig, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training saves its state; started again, the same figures come out as of a bench that was left alone."""
    stopped = replace(toy, out=tmp_path / "bench", variants=("adapter/base-ahead",))
    forward = adapter.AdapterPhase.forward

    def interrupted(self: adapter.AdapterPhase, batch: Batch, step: int) -> Losses:
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, step)

    monkeypatch.setattr(adapter.AdapterPhase, "forward", interrupted)
    assert bench.bench(stopped) == bench.STOPPED
    monkeypatch.undo()
    assert list(stopped.out.rglob("state.safetensors"))
    with pytest.raises(DAVAEError, match=r"run_0 was made with other settings .*--steps\.adapter: was 2, is 3"):
        comparable.check(
            stopped.out, chosen(stopped.variants), comparable.settings(bench.quick(toy)) | {"steps.adapter": 3}
        )
    assert bench.bench(stopped) == 0
    told, alone = (json.loads((out / "adapter/paper/0.json").read_text("utf-8")) for out in (stopped.out, done))
    assert told["figures"] == alone["figures"]


def test_a_bench_of_nothing_is_refused() -> None:
    with pytest.raises(DAVAEError, match="at least one seed"):
        BenchConfig(seeds=())
    with pytest.raises(DAVAEError, match="5 checkpoints do not fit"):
        BenchConfig(steps=Steps(adapter=4))


def test_an_adapter_that_recommends_no_size_is_named(toy: BenchConfig, tmp_path: Path) -> None:
    told = checkpoints.load_adapter(toy.adapter)
    path = tmp_path / "silent.safetensors"
    checkpoints.save_adapter(path, replace(told, config=replace(told.config, recommended=Recommended())))
    with pytest.raises(DAVAEError, match="does not recommend a size"):
        trainings.side(replace(toy, adapter=path))
