"""The demo: the pack's workflow files, run in a real ComfyUI with prompts of your own. Run by ``dev.py demo``.

Uses the tiny models that ship with the pack.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from davae_core import checkpoints, tiny
from davae_core.text_encoder import words

from . import stopwatch, workflow
from .headless import HeadlessComfy
from .locate import REPOSITORY, find_comfyui
from .scratch import make_base
from .sheet import contact_sheet

FOLDER = REPOSITORY / "workflows"
WORKFLOWS = ("tiny_native", "tiny_davae", "tiny_256", "tiny_roundtrip")
STYLES = ("3d", "flat", "noto", "twitter")
WEIGHT = re.compile(r":\s*[\d.]+\s*\)")  # of "(peach:1.5)"


@dataclass(frozen=True)
class Picture:
    """A picture that a workflow saved.

    Attributes:
        prompt: the index of the prompt it was drawn from.
        name: the prefix its Save Image node gives to files.
        label: the title of its Save Image node.
        file: where it is.
    """

    prompt: int
    name: str
    label: str
    file: Path


def split_prompts(texts: Sequence[str]) -> list[str]:
    """The prompts in what was given with ``--prompt``, where commas separate them; each once."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def unknown_words(prompt: str, vocabulary: Sequence[str]) -> list[str]:
    """The words of a prompt that are not in the vocabulary."""
    return [word for word in dict.fromkeys(words(WEIGHT.sub(")", prompt))) if word not in vocabulary]


def known_words(vocabulary: Sequence[str], count: int = 24) -> str:
    """Styles and some other words of a vocabulary, for a person to choose from."""
    styles = [word for word in STYLES if word in vocabulary]
    names = [word for word in vocabulary if word not in STYLES and len(word) > 3]
    some = names[:: max(1, -(-len(names) // count))]
    return f"styles: {', '.join(styles)}; names: {', '.join(some)}" + (", ..." if len(some) < len(names) else "")


def file_words(prompt: str, most: int = 60) -> str:
    """A prompt's words as part of a file name, cut to what any file system takes; ``prompt`` where it has none."""
    return "_".join(words(prompt))[:most].rstrip("_") or "prompt"


def remarks(prompts: Sequence[str], vocabulary: Sequence[str]) -> list[str]:
    """What a person should know about prompts that the tiny model cannot draw as they stand."""
    lines = []
    for prompt in prompts:
        unknown = unknown_words(prompt, vocabulary)
        if unknown:
            lines.append(f'"{prompt}": the tiny model does not know {", ".join(unknown)}')
        elif not set(words(prompt)) & set(STYLES):
            lines.append(f'"{prompt}" names no style; the tiny model was trained on "style name", as in "3d peach"')
    return [*lines, f"it knows {len(vocabulary)} words; {known_words(vocabulary)}"] if lines else []


def psnr(a: Path, b: Path) -> float:
    """Peak signal-to-noise ratio in dB between two pictures of one size; infinite where they are equal."""
    x, y = (np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) for path in (a, b))
    error = float(((x - y) ** 2).mean())
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


class Demo:
    """Runs workflows and keeps what they save."""

    def __init__(self, comfy: HeadlessComfy, out: Path) -> None:
        self.comfy = comfy
        self.out = out
        self.pictures: list[Picture] = []

    def vocabulary(self) -> tuple[str, ...]:
        """The words that the tiny model's text encoder knows."""
        import folder_paths

        path = folder_paths.get_full_path("text_encoders", tiny.TEXT_ENCODER)
        return checkpoints.load_text_encoder(path).config.vocabulary

    def run(self, name: str, prompts: Sequence[str], seed: int | None) -> None:
        """One workflow with every prompt: models are loaded for the first one alone."""
        import server

        loaded = workflow.load(FOLDER / f"{name}.json", self.comfy.nodes)
        for index, text in enumerate(prompts):
            prompt = workflow.with_values(loaded, "Prompt", text=text)
            sampler = next(key for key, node in prompt.items() if "seed" in node["inputs"])
            if seed is not None:
                prompt[sampler]["inputs"]["seed"] = seed
            with stopwatch.recorded(server.PromptServer.instance) as events:
                start = time.perf_counter()
                outputs = self.comfy.run(prompt).outputs
                end = time.perf_counter()
            print(f'\n{name}.json, "{text}": {end - start:.2f} s', flush=True)
            self._print_times(prompt, events, end, sampler)
            self._keep(index, text, prompt, outputs)

    def _print_times(self, prompt: workflow.Prompt, events: list[stopwatch.Event], end: float, sampler: str) -> None:
        kinds = stopwatch.by_kind(stopwatch.node_seconds(events, end), prompt)
        count, each = stopwatch.steps(events, sampler)
        for kind, seconds in kinds.items():
            detail = f"  ({count} steps, {1000 * each:.0f} ms each)" if kind == "sampling" and each else ""
            print(f"  {kind:9s} {seconds:7.2f} s{detail}", flush=True)

    def _keep(self, index: int, text: str, prompt: workflow.Prompt, outputs: dict[str, dict]) -> None:
        import folder_paths

        for key, node in prompt.items():
            if node["class_type"] != "SaveImage":
                continue
            (saved,) = outputs[key]["images"]
            prefix = node["inputs"]["filename_prefix"]
            file = self.out / f"{index + 1}_{file_words(text)}_{prefix}.png"
            shutil.copyfile(Path(folder_paths.get_output_directory(), saved["subfolder"], saved["filename"]), file)
            print(f"  {file}", flush=True)
            self.pictures.append(Picture(index, prefix, node["_meta"]["title"], file))

    def sheet(self, prompts: Sequence[str]) -> Path:
        """All pictures on one sheet, a row for each prompt."""
        rows = [
            (f'"{text}"', [(p.label, Image.open(p.file)) for p in self.pictures if p.prompt == index])
            for index, text in enumerate(prompts)
        ]
        path = self.out / "sheet.png"
        contact_sheet(rows).save(path)
        return path

    def print_round_trips(self, prompts: Sequence[str]) -> None:
        """How well each drawn picture survived encoding and decoding."""
        for index, text in enumerate(prompts):
            files = {p.name: p.file for p in self.pictures if p.prompt == index}
            similarity = psnr(files["tiny_davae"], files["tiny_roundtrip"])
            print(f'"{text}", encoded and decoded again: {similarity:.1f} dB PSNR to the drawn picture')


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help='what to draw: a style and a name (default: "3d peach"); several with commas, or given several times',
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="noise seed (default: the one in the workflow files)")
    parser.add_argument(
        "--out", type=Path, default=Path("output/demo"), help="where the pictures go (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    prompts = split_prompts(options.prompt or ["3d peach"])
    if not prompts:
        parser.error("--prompt holds no words")
    if options.seed is not None and not 0 <= options.seed < 2**64:
        parser.error("--seed must be a whole number from 0 to 2^64 - 1")
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="davae-demo-") as folder:
        base = make_base(Path(folder), REPOSITORY)
        start = time.perf_counter()
        demo = Demo(HeadlessComfy(base, find_comfyui()), options.out)
        print(f"ComfyUI {demo.comfy.comfyui.version} started in {time.perf_counter() - start:.1f} s", flush=True)
        for line in remarks(prompts, demo.vocabulary()):
            print(line, flush=True)
        for name in WORKFLOWS:
            demo.run(name, prompts, options.seed)
        print()
        demo.print_round_trips(prompts)
        print(f"all on one sheet: {demo.sheet(prompts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
