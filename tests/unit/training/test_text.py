"""Text embeddings once: tokens, files of every layout, going on after an interruption, reading.

That they equal ComfyUI's is shown in tests/graph/test_text.py; here the encoders and vocabularies are toys.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from davae_core import records
from davae_core.checkpoints import files
from davae_core.embeddings import KIND, load_embeddings
from davae_core.errors import CheckpointError, DAVAEError
from davae_core.training.text import encode as command
from davae_core.training.text import encoders as text_encoders
from davae_core.training.text.encode import TextConfig, captions_in, encode_all
from davae_core.training.text.encoders import Encoded, TextEncoders, load_clip, load_t5, read_state
from davae_core.training.text.tokens import Tokenizers, as_prompt, chunks
from harness import sd35

TOY_WIDTHS = {"clip_l": 16, "clip_g": 24, "t5xxl": 48}
WORDS = 600
ABOUT = {"context": 48, "pooled": 40}
CAPTIONS = ["", *(f"caption {i}" for i in range(9))]


@pytest.fixture(scope="module")
def toy_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as a ComfyUI's tokenizers, of letters and the word cat."""
    root = tmp_path_factory.mktemp("comfyui")
    clip, t5 = root / "comfy/sd1_tokenizer", root / "comfy/text_encoders/t5_tokenizer"
    clip.mkdir(parents=True), t5.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (clip / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (clip / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n", encoding="utf-8")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁cat", -1.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((chr(i), -3.0) for i in range(33, 127))], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(t5 / "tokenizer.json"))
    return root


@pytest.fixture
def toy_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    for role, width in TOY_WIDTHS.items():
        monkeypatch.setitem(text_encoders.WIDTHS, role, width)


@pytest.fixture
def states() -> dict[str, dict[str, torch.Tensor]]:
    made = {
        "clip_l": sd35.clip_state(16, WORDS),
        "clip_g": sd35.clip_state(24, WORDS),
        "t5xxl": sd35.t5_state(48, 64, WORDS),
    }
    return {role: {name: tensor.half() for name, tensor in state.items()} for role, state in made.items()}


@pytest.fixture
def toy_files(tmp_path: Path, states: dict[str, dict[str, torch.Tensor]], toy_widths: None) -> dict[str, Path]:
    """Single-file text encoders, as ComfyUI reads them."""
    places = {role: tmp_path / f"{role}.safetensors" for role in states}
    for role, path in places.items():
        save_file(states[role], path)
    return places


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images; one has two captions, one of them also another's, and one has none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a cat")
    (folder / "b.json").write_text(json.dumps({"caption": ["a cat", "a (cat:1.2) and " + "cat " * 80]}))
    return folder


class Counting:
    """Stands in for the encoders: what it says depends on the caption alone."""

    context = ABOUT["context"]

    def __init__(self, stop_after: int = 10**9) -> None:
        self.asked: list[str] = []
        self.stop_after = stop_after

    def __call__(self, captions: Sequence[str]) -> list[Encoded]:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += captions
        return [self.one(caption) for caption in captions]

    @staticmethod
    def one(caption: str) -> Encoded:
        seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big")
        generator = torch.Generator().manual_seed(seed)
        sizes = (77, 40), (77 + len(caption), 48), (40,)
        return Encoded(*(torch.randn(size, generator=generator) for size in sizes))


def encode(out: Path, encoder: Counting, captions: Sequence[str] = CAPTIONS, **about: object) -> int:
    config = TextConfig(images=(), out=out, batch=2, shard=4)
    return encode_all(encoder, captions, out, ABOUT | about, config)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, object]:
    """What a folder holds: the index, and of each shard the metadata and the hash that its data really have."""
    index = json.loads((folder / records.INDEX).read_text())
    assert {path.name for path in folder.iterdir()} == {records.INDEX, *(shard["file"] for shard in index["shards"])}
    paths = [folder / shard["file"] for shard in index["shards"]]
    return {"index": index, **{path.name: (*files.read_metadata(path), records.data_hash(path)) for path in paths}}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    data[8 + header + 5] ^= 1
    path.write_bytes(data)


# Tokens


@pytest.mark.parametrize(("count", "sizes"), [(0, [0]), (1, [1]), (75, [75]), (76, [75, 1]), (200, [75, 75, 50])])
def test_clip_reads_chunks_of_75_between_start_and_end(count: int, sizes: list[int]) -> None:
    made = chunks(range(100, 100 + count), start=1, end=2, pad=3)
    assert [len(chunk) for chunk in made] == [77] * len(sizes)
    assert all(chunk[0] == 1 and chunk[size + 1] == 2 for chunk, size in zip(made, sizes, strict=True))
    assert all(set(chunk[size + 2 :]) <= {3} for chunk, size in zip(made, sizes, strict=True))
    inside = [token for chunk, size in zip(made, sizes, strict=True) for token in chunk[1 : size + 1]]
    assert inside == list(range(100, 100 + count))


def test_the_encoders_are_padded_each_in_its_own_way(toy_tokenizers: Path) -> None:
    tokens = Tokenizers(toy_tokenizers)("cat")
    clip = Tokenizers(toy_tokenizers).clip
    start, cat, end = (clip.convert_tokens_to_ids(word) for word in ("<|startoftext|>", "cat</w>", "<|endoftext|>"))
    assert tokens.clip_l == ((start, cat, end, *[end] * 74),)
    assert tokens.clip_g == ((start, cat, end, *[0] * 74),)
    assert tokens.t5 == (4, 1, *[0] * 75)


def test_t5_is_never_cut(toy_tokenizers: Path) -> None:
    tokens = Tokenizers(toy_tokenizers)("cat " * 90)
    assert len(tokens.t5) == 91 and len(tokens.clip_l) == 2


def test_parentheses_are_read_as_they_stand(toy_tokenizers: Path) -> None:
    tokenizers = Tokenizers(toy_tokenizers)
    assert as_prompt("a (b:1.2) \\(c)") == "a \\(b:1.2\\) \\\\(c\\)"
    assert len(tokenizers("(cat:1.2)").clip_l[0]) == 77
    assert tokenizers("(cat:1.2)") != tokenizers("cat")


def test_tokenizers_of_a_diffusers_folder_are_those_of_a_comfyui(toy_tokenizers: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_tokenizers / "comfy/sd1_tokenizer", tmp_path / "tokenizer")
    assert Tokenizers(tmp_path, t5=False)("a cat").t5 == ()
    with pytest.raises(DAVAEError, match=r"holds no tokenizers: expected .*tokenizer_3.*--tokenizers"):
        Tokenizers(tmp_path)
    shutil.copytree(toy_tokenizers / "comfy/text_encoders/t5_tokenizer", tmp_path / "tokenizer_3")
    assert Tokenizers(tmp_path)("a cat, 2") == Tokenizers(toy_tokenizers)("a cat, 2")


# Files


def test_a_checkpoint_and_a_diffusers_folder_hold_the_same_encoders(
    toy_files: dict[str, Path], states: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    whole = {
        f"text_encoders.{role}.transformer.{name}": t for role, state in states.items() for name, t in state.items()
    }
    save_file(whole | {"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "whole.safetensors")
    folder = tmp_path / "text_encoder_3"
    folder.mkdir()
    names = sorted(states["t5xxl"])
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: states["t5xxl"][name] for name in some}, folder / file)
    weight_map = {name: file for file, some in parts.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for role, state in states.items():
        assert read_state(tmp_path / "whole.safetensors", role).keys() == state.keys()  # type: ignore[arg-type]
    tokens = torch.randint(0, WORDS, (2, 80))
    expected = load_t5(toy_files["t5xxl"])(tokens)
    assert torch.equal(load_t5(folder)(tokens), expected)
    assert torch.equal(load_t5(tmp_path / "whole.safetensors")(tokens), expected)
    assert expected.std() > 0.1


def test_weights_stay_as_they_are_stored_and_are_read_in_fp32(toy_files: dict[str, Path]) -> None:
    model = load_clip(toy_files["clip_g"], "clip_g")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    hidden, pooled = model(torch.randint(0, WORDS, (1, 77)), end=3)
    assert hidden.dtype == pooled.dtype == torch.float32


def test_scaled_fp8_is_its_values_times_the_scales(
    toy_files: dict[str, Path], states: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    state = states["t5xxl"]
    eighth = state[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(
        state | {f"{name}.weight": eighth, f"{name}.scale_weight": torch.tensor(3.0)}, tmp_path / "scaled.safetensors"
    )
    save_file(state | {f"{name}.weight": eighth.float() * 3}, tmp_path / "plain.safetensors")
    tokens = torch.randint(0, WORDS, (1, 77))
    scaled, plain = load_t5(tmp_path / "scaled.safetensors"), load_t5(tmp_path / "plain.safetensors")
    torch.testing.assert_close(scaled(tokens), plain(tokens))
    assert not torch.allclose(scaled(tokens), load_t5(toy_files["t5xxl"])(tokens), atol=1e-3)


def test_files_that_do_not_fit_are_refused_by_name(
    toy_files: dict[str, Path], states: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"clip_g.* is 24 wide, but the clip_l of SD3 is 16 wide; were two"):
        load_clip(toy_files["clip_g"], "clip_l")
    with pytest.raises(CheckpointError, match=r"t5xxl.*has no tensor text_model.*is it a clip_l"):
        load_clip(toy_files["t5xxl"], "clip_l")
    cut = {name: t for name, t in states["clip_l"].items() if "layers.1.mlp.fc2.bias" not in name}
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"cut.*encoder.layers.1.mlp.fc2.bias is missing, expected \[16\]"):
        load_clip(tmp_path / "cut.safetensors", "clip_l")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors"):
        load_t5(tmp_path / "nothing")


# Going on


def test_each_caption_is_encoded_once_and_the_empty_one_always(photos: Path) -> None:
    found = captions_in([str(photos)])
    assert found[:2] == ["", "a cat"] and len(found) == 3


def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    assert encode(tmp_path / "whole", Counting()) == len(CAPTIONS)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "cut", Counting(stop_after=6))
    with pytest.raises(DAVAEError, match=r"not a finished set.*run python -m davae_core.training text"):
        load_embeddings(tmp_path / "cut")
    second = Counting()
    assert encode(tmp_path / "cut", second) == len(CAPTIONS) - 4
    assert second.asked == CAPTIONS[4:]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    third = Counting()
    assert encode(tmp_path / "cut", third) == 0 and not third.asked


@pytest.mark.parametrize("how", ["a bit", "cut short", "gone"])
def test_a_damaged_shard_is_found_and_made_again(tmp_path: Path, how: str) -> None:
    encode(tmp_path, Counting())
    before, victim = contents(tmp_path), tmp_path / "shard_000001.safetensors"
    data = victim.read_bytes()
    if how == "a bit":
        damage(victim)
    else:
        victim.unlink() if how == "gone" else victim.write_bytes(data[:-10])
        with pytest.raises(DAVAEError, match=r"shard_000001.safetensors is missing or damaged; run"):
            load_embeddings(tmp_path)
    again = Counting()
    encode(tmp_path, again)
    assert again.asked == CAPTIONS[4:8]
    assert contents(tmp_path) == before


def test_captions_can_be_added(tmp_path: Path) -> None:
    encode(tmp_path, Counting())
    more = Counting()
    encode(tmp_path, more, [*CAPTIONS, "a new one"])
    assert more.asked == ["a new one"]
    embeddings = load_embeddings(tmp_path)
    assert len(embeddings) == len(CAPTIONS) + 1
    embeddings([*CAPTIONS, "a new one"])


def test_other_encoders_do_not_mix(tmp_path: Path, toy_files: dict[str, Path]) -> None:
    encode(tmp_path, Counting(), encoders="one")
    with pytest.raises(DAVAEError, match=r"made with something else \(encoders: 'one', now 'two'\)"):
        encode(tmp_path, Counting(), encoders="two")
    before = records.fingerprint([toy_files["t5xxl"]])
    damage(toy_files["t5xxl"])
    assert records.fingerprint([toy_files["t5xxl"]]) != before != records.fingerprint([toy_files["clip_l"]])


def test_numbers_that_fp16_cannot_hold_are_refused(tmp_path: Path) -> None:
    class Large(Counting):
        def __call__(self, captions: Sequence[str]) -> list[Encoded]:
            return [Encoded(e.clip * 1e6, e.t5, e.pooled) for e in super().__call__(captions)]

    with pytest.raises(DAVAEError, match=r"computed of '' \(clip\) does not fit torch.float16.*--dtype fp32"):
        encode(tmp_path, Large())


# Reading


def test_context_is_clip_widened_by_zeros_and_then_t5(tmp_path: Path) -> None:
    encode(tmp_path, Counting())
    embeddings = load_embeddings(tmp_path)
    context, pooled, _ = embeddings(["caption 3"])
    one = Counting.one("caption 3")
    assert context.shape == (1, 77 + len(one.t5), 48) and context.dtype == torch.float32
    torch.testing.assert_close(context[0, :77, :40], one.clip, atol=1e-3, rtol=1e-3)
    assert not context[0, :77, 40:].any()
    torch.testing.assert_close(context[0, 77:], one.t5, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pooled[0], one.pooled, atol=1e-3, rtol=1e-3)


def test_shorter_captions_are_filled_up_and_marked(tmp_path: Path) -> None:
    encode(tmp_path, Counting())
    embeddings = load_embeddings(tmp_path)
    context, _, there = embeddings(["caption 1", ""])
    assert there is not None and there.sum(dim=1).tolist() == [77 + 77 + len("caption 1"), 154]
    assert there[1, :154].all() and not context[1, 154:].any()
    assert embeddings(["caption 1", "caption 2"]).present is None


def test_a_caption_that_is_missing_is_named(tmp_path: Path) -> None:
    encode(tmp_path, Counting())
    with pytest.raises(DAVAEError, match=r"no embedding of the caption 'caption 77'; run python -m .* again"):
        load_embeddings(tmp_path)(["caption 1", "caption 77"])
    encode(tmp_path / "without", Counting(), CAPTIONS[1:])
    with pytest.raises(DAVAEError, match="no embedding of the caption ''"):
        load_embeddings(tmp_path / "without")
    records.finish(tmp_path / "without", "something", ABOUT)
    with pytest.raises(DAVAEError, match=rf"tells of 'something' in format 1, expected '{KIND}'"):
        load_embeddings(tmp_path / "without")


# The command


def test_the_command_encodes_the_captions_of_a_folder(
    photos: Path, toy_files: dict[str, Path], toy_tokenizers: Path, tmp_path: Path
) -> None:
    out = tmp_path / "embeddings"
    common = ["--images", str(photos), "--out", str(out), "--tokenizers", str(toy_tokenizers), "--dtype", "fp32"]
    own = [
        f"--{option}={toy_files[role]}"
        for option, role in (("clip-l", "clip_l"), ("clip-g", "clip_g"), ("t5", "t5xxl"))
    ]
    with pytest.raises(DAVAEError, match=r"no t5xxl is given: name its file \(--t5\).*--without-t5"):
        command.main([*common, *own[:2]])
    (tmp_path / "sheet.txt").write_text("# of the sheets\na fish of glass --d 7\n")
    assert command.main([*common, *own, "--prompts", str(tmp_path / "sheet.txt")]) == 0
    embeddings = load_embeddings(out)
    assert len(embeddings) == len(captions_in([str(photos)])) + 1
    embeddings(["a fish of glass"])
    clip_l, clip_g = (load_clip(toy_files[role], role) for role in ("clip_l", "clip_g"))  # type: ignore[arg-type]
    encoders = TextEncoders(Tokenizers(toy_tokenizers), clip_l, clip_g, load_t5(toy_files["t5xxl"]))
    for caption in captions_in([str(photos)]):
        context, pooled, _ = embeddings([caption])
        [told] = encoders([caption])
        torch.testing.assert_close(context[0, : len(told.clip), :40], told.clip, atol=1e-5, rtol=0)
        torch.testing.assert_close(context[0, len(told.clip) :], told.t5, atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled[0], told.pooled, atol=1e-5, rtol=0)
    bare = tmp_path / "without"
    assert command.main([*common[:3], str(bare), *common[4:], *own[:2], "--without-t5"]) == 0
    assert torch.equal(load_embeddings(bare)([""])[0], embeddings([""])[0][:, :77])


def test_prompts_alone_are_encoded(
    toy_files: dict[str, Path], toy_tokenizers: Path, tmp_path: Path, photos: Path
) -> None:
    common = ["--tokenizers", str(toy_tokenizers), "--without-t5"]
    common += [f"--clip-l={toy_files['clip_l']}", f"--clip-g={toy_files['clip_g']}"]
    (tmp_path / "p.txt").write_text("# of the sheets\na fish of glass --d 7\n")
    out = tmp_path / "embeddings"
    assert command.main([*common, "--prompts", str(tmp_path / "p.txt"), "--out", str(out)]) == 0
    assert len(load_embeddings(out)) == 2
    load_embeddings(out)(["", "a fish of glass"])
    (tmp_path / "q.txt").write_text("two boats\n")
    images = [f"{tmp_path / 'q.txt'}::prefix=a photo of", str(photos)]
    assert command.main([*common, "--images", *images, "--out", str(out)]) == 0
    load_embeddings(out)(["a photo of two boats", "a cat"])
    with pytest.raises(DAVAEError, match=r"no captions are given: .*--images.*--prompts"):
        command.main([*common, "--out", str(tmp_path / "nothing")])
    assert not (tmp_path / "nothing").exists()


def test_two_commands_do_not_write_into_one_folder(photos: Path, tmp_path: Path) -> None:
    with records.claimed(tmp_path / "e"), pytest.raises(DAVAEError, match=r"another process is at work in .*--out"):
        command.main(["--images", str(photos), "--out", str(tmp_path / "e")])
