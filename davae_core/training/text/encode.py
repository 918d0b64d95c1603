"""Compute the text embeddings of all captions of a training once, so that it needs no text encoder.

    python -m davae_core.training text --images photos --out embeddings --tokenizers ComfyUI \\
        --clip-l clip_l.safetensors --clip-g clip_g.safetensors --t5 t5xxl_fp16.safetensors

What is written equals what ComfyUI's own encoders make of the same files and captions. Captions are read literally:
parentheses are no weights, as if each were escaped in ComfyUI's prompt box. What is not yet written, or damaged, is
computed when the command is run again.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from ... import devices, records
from ...embeddings import KIND, key_of
from ...errors import DAVAEError
from ..data import entries, prompts, sources
from ..data.listing import Source
from .asked import read_prompts
from .encoders import Role, TextEncoders, load_clip, load_t5, weight_files
from .tokens import Tokenizers

FOLDERS: dict[Role, str] = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextConfig:
    """Which captions, which encoders, and where the embeddings go."""

    out: Path
    """Folder for the embeddings."""
    images: tuple[str, ...] = ()
    """Folders of images, WebDataset shards, and text files of prompts, one a line, as --data.images of the training."""
    prompts: Path | None = None
    """Text file of prompts, one a line: those of the sample sheets, as --run.prompts of the training."""
    model: Path | None = None
    """A folder of SD3 / SD3.5 in diffusers' layout (then its tokenizers are used too), or a checkpoint with the text
    encoders in it; for what is not given by itself."""
    clip_l: Path | None = None
    """CLIP-L: a file, or a folder of diffusers' layout."""
    clip_g: Path | None = None
    """CLIP-G: likewise."""
    t5: Path | None = None
    """T5-XXL: likewise; fp16, fp8 or scaled fp8."""
    without_t5: bool = False
    """Leave T5 out: 77 text tokens of CLIP alone, as ComfyUI's DualCLIPLoader does."""
    tokenizers: Path | None = None
    """A ComfyUI folder, or a folder of diffusers' layout, where the tokenizers are."""
    batch: int = 16
    """Captions to encode at once."""
    shard: int = 256
    """Captions per file; an interruption costs at most this many. 256 take about 250 MB in fp16."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Precision of the stored numbers; the arithmetic is in fp32."""
    device: str = "auto"
    """Device to compute on; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.shard < 1:
            raise DAVAEError(f"batch and shard must be at least 1, got {self.batch} and {self.shard}")


def asked_captions(config: TextConfig) -> list[str]:
    """All captions and prompts to encode, each once, after the empty one.

    Raises:
        DAVAEError: none are given, or they cannot be read.
    """
    if not config.images and config.prompts is None:
        raise DAVAEError("no captions are given: name images or text files of prompts (--images), or --prompts")
    asked = read_prompts(config.prompts) if config.prompts is not None else []
    return list(dict.fromkeys([*captions_in(config.images), *(one.prompt for one in asked)]))


def captions_in(images: Iterable[str]) -> list[str]:
    """The captions of all images and the lines of text files, each once, after the empty one.

    Raises:
        DAVAEError: see :func:`davae_core.training.data.sources.index` and
            :func:`davae_core.training.data.prompts.lines_of`.
    """
    found: list[Source] = []
    for text in images:
        entry = entries.parse(text)
        found += prompts.lines_of(entry) if prompts.is_text(entry) else sources.index([text])
    listed = (caption for source in found for caption in source.captions)
    return list(dict.fromkeys(["", *listed]))


def encode_all(
    encoders: TextEncoders, captions: Sequence[str], out: Path, about: dict[str, Any], config: TextConfig
) -> int:
    """Encode what is missing in ``out``; returns how many captions that were.

    Raises:
        DAVAEError: ``out`` was made with other encoders; an embedding cannot be stored.
    """
    found = records.survey(out, KIND, about)
    for path in found.damaged:
        logger.warning("%s is damaged: its captions are encoded again", path)
        path.unlink()
    known = found.keys
    missing = [caption for caption in captions if key_of(caption) not in known]
    free = list(islice(found.free, -(-len(missing) // config.shard)))
    with tqdm(total=len(missing), unit="caption", disable=not missing) as bar:
        for number, start in zip(free, range(0, len(missing), config.shard), strict=True):
            made: dict[str, records.Record] = {}
            part = missing[start : start + config.shard]
            for first in range(0, len(part), config.batch):
                some = part[first : first + config.batch]
                for caption, encoded in zip(some, encoders(some), strict=True):
                    made[key_of(caption)] = records.stored(vars(encoded), records.DTYPES[config.dtype], repr(caption))
                bar.update(len(some))
            records.write(out, number, made, KIND, about)
    records.finish(out, KIND, about)
    return len(missing)


def _source(config: TextConfig, role: Role, own: Path | None) -> Path:
    """Where an encoder is."""
    if own is not None:
        return own
    if config.model is None:
        option = "--t5" if role == "t5xxl" else f"--{role.replace('_', '-')}"
        more = ", or leave T5 out (--without-t5)" if role == "t5xxl" else ""
        raise DAVAEError(f"no {role} is given: name its file ({option}) or a model that has it (--model){more}")
    return config.model / FOLDERS[role] if config.model.is_dir() else config.model


def run(config: TextConfig) -> int:
    """Encode the captions of a training; returns how many had to be encoded.

    Raises:
        DAVAEError: something is missing or cannot be used, or another process is at work in the folder.
    """
    device = devices.device(config.device)
    captions = asked_captions(config)
    with records.claimed(config.out):
        return _encoded(config, captions, device)


def _encoded(config: TextConfig, captions: Sequence[str], device: torch.device) -> int:
    """What :func:`run` does in the folder."""
    places: dict[Role, Path] = {
        "clip_l": _source(config, "clip_l", config.clip_l),
        "clip_g": _source(config, "clip_g", config.clip_g),
    }
    if not config.without_t5:
        places["t5xxl"] = _source(config, "t5xxl", config.t5)
    words = config.tokenizers or (config.model if config.model and config.model.is_dir() else None)
    if words is None:
        raise DAVAEError("no tokenizers are given: name a ComfyUI or diffusers folder (--tokenizers)")
    tokenizers = Tokenizers(words, t5=not config.without_t5)
    clip_l, clip_g = load_clip(places["clip_l"], "clip_l"), load_clip(places["clip_g"], "clip_g")
    t5 = load_t5(places["t5xxl"]) if "t5xxl" in places else None
    for encoder in filter(None, (clip_l, clip_g, t5)):
        encoder.to(device)
    encoders = TextEncoders(tokenizers, clip_l, clip_g, t5)
    about = {
        "context": encoders.context,
        "pooled": clip_l.width + clip_g.width,
        "dtype": config.dtype,
        "encoders": {role: records.fingerprint(weight_files(place)) for role, place in places.items()},
    }
    done = encode_all(encoders, captions, config.out, about, config)
    logger.info("%s holds the embeddings of %d captions, %d of them new", config.out, len(captions), done)
    return done


def main(args: list[str] | None = None) -> int:
    """Compute embeddings from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(tyro.cli(TextConfig, description=__doc__, args=args))
    return 0
