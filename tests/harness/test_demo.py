"""The demo as a person runs it, and its parts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import demo, sheet, stopwatch
from harness.stopwatch import Event

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = ("3d", "flat", "fox", "noto", "peach", "rocket", "twitter")
PICTURES = ("tiny_native", "tiny_davae", "tiny_256", "tiny_roundtrip", "tiny_roundtrip_base")


@dataclass(frozen=True)
class Run:
    """One run of the demo."""

    out: Path
    text: str


def start(*arguments: str, out: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "harness.demo", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, comfyui) -> Run:
    """Two prompts, one of them with a word that no tiny model knows."""
    out = tmp_path_factory.mktemp("demo")
    done = start("--prompt", "3d peach", "--prompt", "flat xyzzy", "--seed", "5", out=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(out, done.stdout)


def test_every_prompt_gives_every_picture(run: Run) -> None:
    wanted = {f"{start}_{name}.png" for start in ("1_3d_peach", "2_flat_xyzzy") for name in PICTURES} | {"sheet.png"}
    assert {file.name for file in run.out.iterdir()} == wanted
    sizes = {name: Image.open(run.out / f"1_3d_peach_{name}.png").size for name in PICTURES}
    assert sizes["tiny_davae"] == tuple(2 * side for side in sizes["tiny_native"])
    assert sizes["tiny_256"] == tuple(2 * side for side in sizes["tiny_davae"]) == (256, 256)
    assert sizes["tiny_roundtrip"] == sizes["tiny_davae"] and sizes["tiny_roundtrip_base"] == sizes["tiny_native"]


def test_the_prompt_is_what_is_drawn(run: Run) -> None:
    for name in PICTURES:
        one, two = (np.asarray(Image.open(run.out / f"{p}_{name}.png")) for p in ("1_3d_peach", "2_flat_xyzzy"))
        assert (one != two).any(), name


def test_it_says_where_the_pictures_are_and_how_long_each_step_took(run: Run) -> None:
    for file in run.out.iterdir():
        assert str(file) in run.text
    first = run.text[run.text.index('tiny_native.json, "3d peach"') :]
    first = first[: first.index("tiny_native.json,", 20)]
    kinds = [line.split()[0] for line in first.splitlines()[1:6]]
    assert sorted(kinds[:4]) == ["decoding", "models", "sampling", "text"] and kinds[4] == "other"
    assert "(30 steps, " in first and " ms each)" in first


def test_it_says_which_words_are_unknown_and_names_known_ones(run: Run) -> None:
    assert '"flat xyzzy": the tiny model does not know xyzzy' in run.text
    assert "styles: 3d, flat" in run.text and '"3d peach": the' not in run.text


def test_the_models_are_the_trained_ones_of_the_pack(run: Run) -> None:
    assert "UNTRAINED" not in run.text


def test_the_round_trip_is_measured(run: Run) -> None:
    expected = demo.psnr(run.out / "1_3d_peach_tiny_davae.png", run.out / "1_3d_peach_tiny_roundtrip.png")
    assert f'"3d peach", encoded and decoded again: {expected:.1f} dB PSNR' in run.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--prompt", " , "], "--prompt holds no words"), (["--seed", "-1"], "--seed must be"), (["--seed", "x"], "seed")],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        demo.main(["--out", str(tmp_path), *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_prompts_are_separated_by_commas_and_each_drawn_once() -> None:
    assert demo.split_prompts(["3d peach, noto fox", " flat owl ", "3d peach", ""]) == [
        "3d peach",
        "noto fox",
        "flat owl",
    ]


def test_words_are_compared_as_the_text_encoder_reads_them() -> None:
    assert demo.unknown_words("3D Peach!", VOCABULARY) == []
    assert demo.unknown_words("3d (peach:1.5)", VOCABULARY) == []
    assert demo.unknown_words("oil painting of a peach, oil", VOCABULARY) == ["oil", "painting", "of", "a"]


def test_a_prompt_without_a_style_is_remarked_on_and_a_good_one_is_not() -> None:
    assert demo.remarks(["noto rocket"], VOCABULARY) == []
    (about, known) = demo.remarks(["peach"], VOCABULARY)
    assert about.startswith('"peach" names no style')
    assert known == "it knows 7 words; styles: 3d, flat, noto, twitter; names: peach, rocket"


@pytest.mark.parametrize("prompt", ["3d peach " * 100, "桃子", "x" * 5000, "a/b\\c", ""])
def test_a_prompt_of_any_length_and_letters_makes_a_file_name(tmp_path: Path, prompt: str) -> None:
    """A long one ended in "File name too long", and the sheet was lost."""
    (tmp_path / f"1_{demo.file_words(prompt)}_tiny_roundtrip_base.png").write_bytes(b"")
    assert demo.file_words(prompt) and "/" not in demo.file_words(prompt)
    assert demo.file_words("3d peach") == "3d_peach" and demo.file_words("桃子") == "prompt"


def test_a_long_vocabulary_is_shown_in_part() -> None:
    vocabulary = ("3d", *(f"word{i:03d}" for i in range(100)))
    shown = demo.known_words(vocabulary, count=24)
    assert shown.startswith("styles: 3d; names: word000, word005") and shown.endswith(", ...")
    assert shown.count("word") <= 24


def test_small_pictures_are_enlarged_by_whole_factors_and_keep_their_pixels() -> None:
    small = Image.fromarray(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3) * 5)
    large = sheet.enlarged(small, 15)
    assert large.size == (12, 12)
    assert np.array_equal(np.asarray(large), np.asarray(small).repeat(3, axis=0).repeat(3, axis=1))
    assert sheet.enlarged(Image.new("RGB", (300, 200)), 256).size == (300, 200)


def test_a_sheet_shows_every_picture_whole_and_names_it() -> None:
    red, blue = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (300, 150), (0, 0, 255))
    made = sheet.contact_sheet([("one", [("a", red), ("b", blue)]), ("two", [("a", red)])])
    pixels = np.asarray(made)
    assert (pixels == (255, 0, 0)).all(axis=-1).sum() == 2 * 256 * 256
    assert (pixels == (0, 0, 255)).all(axis=-1).sum() == 300 * 150
    bare = np.asarray(sheet.contact_sheet([("", [("", red), ("", blue)]), ("", [("", red)])]))
    assert (pixels[: bare.shape[0]] != bare).any()  # the words


def test_a_node_takes_until_the_next_one_starts() -> None:
    events = [
        Event(1.0, "executing", {"node": "4"}),
        Event(1.5, "progress_state", {"nodes": {"4": {"value": 1, "max": 3}}}),
        Event(3.0, "executing", {"node": "7"}),
        Event(3.5, "executing", {"node": "4"}),
    ]
    assert stopwatch.node_seconds(events, 4.0) == {"4": 2.5, "7": 0.5}
    prompt = {"4": {"class_type": "KSampler"}, "7": {"class_type": "SaveImage"}}
    assert stopwatch.by_kind({"4": 2.5, "7": 0.5}, prompt) == {"sampling": 2.5, "other": 0.5}


def test_time_per_step_does_not_count_what_comes_before_the_first() -> None:
    events = [
        Event(10.0 + 0.5 * i, "progress_state", {"nodes": {"4": {"value": value, "max": 3}, "2": {"value": 9}}})
        for i, value in enumerate([0, 1, 1, 2, 3])
    ]
    assert stopwatch.steps(events, "4") == (3, 0.5 * 3 / 2)
    assert stopwatch.steps(events[:2], "4") == (1, 0.0)
    assert stopwatch.steps(events, "5") == (0, 0.0)
