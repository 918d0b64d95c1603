"""Text embeddings made for training are the conditioning that ComfyUI makes of the same files and captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from davae_core import records
from davae_core.embeddings import Embeddings, context_of, load_embeddings
from davae_core.training.text import encode
from davae_core.training.text.encoders import TextEncoders, load_clip, load_t5
from davae_core.training.text.tokens import Tokenizers, as_prompt
from harness import sd35
from harness.graph import Graph
from harness.headless import HeadlessComfy
from harness.locate import ComfyUI

FILES = {"clip_l": sd35.CLIP_L, "clip_g": sd35.CLIP_G, "t5xxl": sd35.T5}
CAPTIONS = {
    "empty": "",
    "short": "A photo of a red-haired cat, 4k. It's here!",
    "parentheses": "a (big:1.2) cat (on the mat) :) and a \\(dog\\)",
    "end of text inside": "one <|endoftext|> two",
    "75 tokens": " ".join(["cat"] * 75),
    "76 tokens": " ".join(["cat"] * 76),
    "long": " ".join(f"{number} grey cats, café naïveté 猫 and" for number in range(24)),
}
# What the harness's short text encoders change in ComfyUI's own configurations; the first is of both CLIPs.
SHORT = {
    "model_config": sd35.SHORT["clip_config_bigg.json"],
    "t5xxl_model_config": sd35.SHORT["text_encoders/t5_config_xxl.json"],
}
# By this tensor ComfyUI knows a T5-XXL, to look at its type; in the short one it belongs to no layer.
T5_MARK = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"


@dataclass
class Both:
    """The same files in ComfyUI, as a CLIP object, and here."""

    folder: Path
    clip: Any
    ours: TextEncoders


def rough(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp16; norms and biases too are random, and matrices large enough for differences to show."""
    noise = {name: torch.randn(tensor.shape) for name, tensor in state.items() if tensor.ndim == 1}
    state = {name: tensor * 2 if tensor.ndim == 2 else tensor + 0.2 * noise[name] for name, tensor in state.items()}
    return {name: tensor.half() for name, tensor in state.items()}


def in_comfyui(paths: list[Path]) -> Any:
    """A CLIP object, by the function that TripleCLIPLoader calls; ComfyUI is booted."""
    import comfy.sd

    options = {name: dict(changes) for name, changes in SHORT.items()}
    return comfy.sd.load_clip([str(p) for p in paths], clip_type=comfy.sd.CLIPType.SD3, model_options=options)


@pytest.fixture(scope="module")
def both(comfy: HeadlessComfy, comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Random-weight files of three layers (T5: one) at the true widths, loaded by both."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text_encoders")
    save_file(rough(sd35.clip_state(768)), folder / sd35.CLIP_L)
    save_file(rough(sd35.clip_state(1280) | {sd35.MARK: torch.zeros(1)}), folder / sd35.CLIP_G)
    save_file(rough(sd35.t5_state() | {T5_MARK: torch.zeros(1)}), folder / sd35.T5)
    low, high = load_clip(folder / sd35.CLIP_L, "clip_l"), load_clip(folder / sd35.CLIP_G, "clip_g")
    ours = TextEncoders(Tokenizers(comfyui.root), low, high, load_t5(folder / sd35.T5))
    clip = in_comfyui([folder / name for name in FILES.values()])
    return Both(folder, clip, ours)


@pytest.fixture(scope="module")
def conditioning(comfy: HeadlessComfy, both: Both):
    """``conditioning(prompt)``: context ``[1, L, 4096]`` and pooled ``[1, 2048]`` of the stock CLIPTextEncode."""

    def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        g = Graph()
        clip = g.node("HarnessConstant", key="clip")
        g.node("HarnessCapture", value=g.node("CLIPTextEncode", clip=clip, text=prompt), key="made")
        context, more = comfy.run(g.prompt, inputs={"clip": both.clip}).captured["made"][0]
        return context, more["pooled_output"]

    return encode


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_becomes_what_comfyui_makes_of_it(name: str, both: Both, conditioning) -> None:
    context, pooled = conditioning(as_prompt(CAPTIONS[name]))
    [encoded] = both.ours([CAPTIONS[name]])
    ours = context_of(encoded.clip, encoded.t5, 4096)[None]
    assert ours.shape == context.shape and context.shape[1] >= 154
    assert float(context.std()) > 0.1
    torch.testing.assert_close(ours, context, atol=1e-3, rtol=0)
    torch.testing.assert_close(encoded.pooled[None], pooled, atol=1e-3, rtol=0)


def test_captions_encoded_together_are_as_each_by_itself(both: Both) -> None:
    captions = [CAPTIONS[name] for name in ("short", "76 tokens", "empty")]
    for caption, one in zip(captions, both.ours(captions), strict=True):
        [alone] = both.ours([caption])
        for part in ("clip", "t5", "pooled"):
            torch.testing.assert_close(getattr(one, part), getattr(alone, part), atol=1e-4, rtol=0)


def test_unescaped_parentheses_are_weights_in_comfyui_and_nothing_here(both: Both, conditioning) -> None:
    weighted, _ = conditioning("a (big:1.5) cat")
    plain, _ = conditioning("a big cat")
    [literal] = both.ours(["a (big:1.5) cat"])
    assert (weighted - plain).abs().max() > 0.1
    assert (context_of(literal.clip, literal.t5, 4096) - weighted[0]).abs().max() > 0.1


def test_long_captions_take_more_chunks_and_more_of_t5(both: Both) -> None:
    one, two, long = both.ours([CAPTIONS["75 tokens"], CAPTIONS["76 tokens"], CAPTIONS["long"]])
    assert (len(one.clip), len(two.clip)) == (77, 154)
    assert len(long.clip) > 154 and len(long.t5) > 77


@pytest.mark.parametrize("scaled", [False, True], ids=["fp8", "scaled fp8"])
def test_fp8_files_give_what_comfyui_makes_of_them(scaled: bool, both: Both, tmp_path: Path) -> None:
    state = load_file(both.folder / sd35.T5)
    linear = [name for name in state if any(part in name for part in (".q.", ".k.", ".v.", ".o.", ".wi_", ".wo."))]
    eighth = {name: state[name].to(torch.float8_e4m3fn) for name in (linear if scaled else state)}
    if scaled:
        eighth |= {
            name.replace(".weight", ".scale_weight"): torch.tensor(0.5 + 0.1 * i) for i, name in enumerate(linear)
        }
        eighth["scaled_fp8"] = torch.zeros(0).to(torch.float8_e4m3fn)
    path = tmp_path / "t5xxl_fp8_e4m3fn.safetensors"
    save_file(state | eighth, path)
    clip = in_comfyui([both.folder / sd35.CLIP_L, both.folder / sd35.CLIP_G, path])
    context, _ = clip.encode_from_tokens(clip.tokenize("a grey cat"), return_pooled=True)
    with torch.no_grad():
        ours = load_t5(path)(torch.tensor([both.ours.tokenizers("a grey cat").t5]))
        unscaled = both.ours.t5(torch.tensor([both.ours.tokenizers("a grey cat").t5]))
    torch.testing.assert_close(ours, context[:, 77:], atol=1e-3, rtol=0)
    assert (ours - unscaled).abs().max() > 0.01


def test_the_command_writes_what_comfyui_says_and_adds_what_is_missing(
    both: Both, comfyui: ComfyUI, conditioning, tmp_path: Path
) -> None:
    from PIL import Image

    for i, caption in enumerate(["a cat (grey)", CAPTIONS["long"]]):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption, encoding="utf-8")
    out = tmp_path / "embeddings"
    command = f"--images {tmp_path} --out {out} --tokenizers {comfyui.root} --batch 2 --shard 2".split()
    command += [f"--{role.replace('xxl', '').replace('_', '-')}={both.folder / name}" for role, name in FILES.items()]
    assert encode.main(command) == 0
    embeddings: Embeddings = load_embeddings(out)
    for caption in ("", "a cat (grey)", CAPTIONS["long"]):
        context, pooled, _ = embeddings([caption])
        expected, expected_pooled = conditioning(as_prompt(caption))
        torch.testing.assert_close(context, expected, atol=1e-3, rtol=1e-3)  # stored in fp16
        torch.testing.assert_close(pooled, expected_pooled, atol=1e-3, rtol=1e-3)
    index = (out / records.INDEX).read_text()
    (out / "shard_000000.safetensors").unlink()
    assert encode.main(command) == 0
    assert (out / records.INDEX).read_text() == index  # it holds the checksums
