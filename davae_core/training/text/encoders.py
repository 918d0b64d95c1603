"""CLIP-L, CLIP-G and T5 from the user's files, run by transformers so that they give what ComfyUI's SD3 encoders give.

What ComfyUI does (``comfy/text_encoders/sd3_clip.py`` and what it uses):

- CLIP: the output of the layer before the last, without the final norm; no padding mask. Pooled is the final layer at
  the first end token, normed; for CLIP-G also projected; of the first chunk where there are several.
- T5: the normed output of the last layer; no padding mask, so padding is attended to.
- Weights stay in the type they are stored in (fp16, bf16, fp8); each is cast to fp32 when it is used, and so are the
  scales of scaled fp8 files. So all arithmetic is in fp32.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ...checkpoints import files
from ...checkpoints.tensors import shard_names
from ...errors import CheckpointError
from .tokens import CLIP_LENGTH, Tokenizers, Tokens

Role = Literal["clip_l", "clip_g", "t5xxl"]
State = Mapping[str, torch.Tensor]

CLIP_HEAD, T5_BUCKETS, T5_DISTANCE = 64, 32, 128
ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
# Widths of the encoders that SD3 and SD3.5 were trained with.
WIDTHS: dict[str, int] = {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096}
CLIP_EMBEDDING = "text_model.embeddings.token_embedding.weight"
T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
SCALE = "scale_weight"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Encoded:
    """What the encoders say about one caption, fp32 on the CPU."""

    clip: torch.Tensor
    """``[77 n, 768 + 1280]`` for n chunks."""
    t5: torch.Tensor
    """``[L, 4096]``, L at least 77; ``[0, 4096]`` without T5."""
    pooled: torch.Tensor
    """``[768 + 1280]``."""


class _InFloat32(nn.Module):
    """Reads a stored weight in fp32, scaled if it has a scale."""

    def __init__(self, scale: torch.Tensor | None) -> None:
        super().__init__()
        self.scale: torch.Tensor | None
        self.register_buffer("scale", scale)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float() if self.scale is None else weight.float() * self.scale.float()


def _rows_in_float32(embedding: nn.Module, inputs: object, rows: torch.Tensor) -> torch.Tensor:
    """Reads the rows of a stored embedding in fp32, without reading the whole of it."""
    return rows.float()


class ClipEncoder(nn.Module):
    """One of the CLIP text models.

    Args:
        state: tensors by their names in transformers, ``text_model.*``; surplus ones are ignored.
        role: ``clip_l`` or ``clip_g``.
        file: for errors.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape, or the width is not that of the role.
    """

    def __init__(self, state: State, role: Literal["clip_l", "clip_g"], file: str) -> None:
        super().__init__()
        words, width = _shape(state, CLIP_EMBEDDING, role, file)
        config = CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=_shape(state, "text_model.encoder.layers.0.mlp.fc1.weight", role, file)[0],
            num_hidden_layers=_count(state, r"text_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight"),
            num_attention_heads=max(1, width // CLIP_HEAD),
            max_position_embeddings=CLIP_LENGTH,
            hidden_act=ACTIVATIONS[role],
            projection_dim=width,
        )
        with torch.device("meta"):
            model = CLIPTextModel(config)
        # Older versions of transformers wrap the model in one called text_model, as the files do.
        cut = 0 if any(name.startswith("text_model.") for name in model.state_dict()) else len("text_model.")
        _fill(model, {name[cut:]: t for name, t in state.items() if name.startswith("text_model.")}, file)
        self.model, self.width = model, width
        self.projection: nn.Linear | None = None
        if role == "clip_g":
            with torch.device("meta"):
                self.projection = nn.Linear(width, width, bias=False)
            _fill(self.projection, {"weight": _tensor(state, "text_projection.weight", role, file)}, file)
        self.eval()

    def forward(self, tokens: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode chunks.

        Args:
            tokens: ``[N, 77]``.
            end: the end token, which each chunk has.

        Returns:
            ``[N, 77, width]``, and what is pooled of each chunk, ``[N, width]``.
        """
        out = self.model(tokens, output_hidden_states=True)
        pooled = out.last_hidden_state[torch.arange(len(tokens)), (tokens == end).int().argmax(dim=1)]
        return out.hidden_states[-2], pooled if self.projection is None else self.projection(pooled)


class T5Encoder(nn.Module):
    """The encoder of T5 (version 1.1).

    Args:
        state: tensors by their names in transformers; surplus ones are ignored.
        file: for errors.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape, or the width is not 4096.
    """

    def __init__(self, state: State, file: str) -> None:
        super().__init__()
        embedding = next((name for name in T5_EMBEDDINGS if name in state), T5_EMBEDDINGS[0])
        words, width = _shape(state, embedding, "t5xxl", file)
        attention, gated = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
        heads = _shape(state, f"{attention}relative_attention_bias.weight", "t5xxl", file)[1]
        config = T5Config(
            vocab_size=words,
            d_model=width,
            d_kv=_shape(state, f"{attention}q.weight", "t5xxl", file)[0] // heads,
            d_ff=_shape(state, f"{gated}wi_0.weight", "t5xxl", file)[0],
            num_layers=_count(state, r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight"),
            num_heads=heads,
            relative_attention_num_buckets=T5_BUCKETS,
            relative_attention_max_distance=T5_DISTANCE,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
        with torch.device("meta"):
            model = T5EncoderModel(config)
        _fill(model, {**state, **dict.fromkeys(T5_EMBEDDINGS, state[embedding])}, file)
        self.model, self.width = model, width
        self.eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[N, L]`` to ``[N, L, width]``; padding takes part like any token."""
        return self.model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state


class TextEncoders:
    """The three encoders with their tokenizers.

    Args:
        tokenizers: with T5's if ``t5`` is given.
        clip_l, clip_g, t5: the encoders, on one device.
    """

    def __init__(self, tokenizers: Tokenizers, clip_l: ClipEncoder, clip_g: ClipEncoder, t5: T5Encoder | None) -> None:
        self.tokenizers, self.clip_l, self.clip_g, self.t5 = tokenizers, clip_l, clip_g, t5
        self.context = t5.width if t5 is not None else WIDTHS["t5xxl"]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(self.clip_l.parameters()).device

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Encoded]:
        """Encode captions, read literally; all at once, so as many as the memory allows."""
        tokens = [self.tokenizers(caption) for caption in captions]
        low, low_pooled = self._clip(self.clip_l, [each.clip_l for each in tokens])
        high, high_pooled = self._clip(self.clip_g, [each.clip_g for each in tokens])
        t5 = self._t5(tokens)
        return [
            Encoded(torch.cat([a, b], dim=-1), c, torch.cat([d, e]))
            for a, b, c, d, e in zip(low, high, t5, low_pooled, high_pooled, strict=True)
        ]

    def _clip(
        self, encoder: ClipEncoder, parts: Sequence[tuple[tuple[int, ...], ...]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Context ``[77 n, width]`` and pooled ``[width]`` of each caption."""
        tokens = torch.tensor([chunk for caption in parts for chunk in caption], device=self.device)
        hidden, pooled = (t.cpu() for t in encoder(tokens, self.tokenizers.end))
        counts = [len(caption) for caption in parts]
        context = [one.flatten(0, 1) for one in hidden.split(counts)]
        return context, [one[0] for one in pooled.split(counts)]

    def _t5(self, tokens: Sequence[Tokens]) -> list[torch.Tensor]:
        """Context ``[L, width]`` of each caption; captions of one length are encoded together."""
        if self.t5 is None:
            return [torch.zeros(0, self.context) for _ in tokens]
        out: dict[int, torch.Tensor] = {}
        for length in {len(each.t5) for each in tokens}:
            places = [i for i, each in enumerate(tokens) if len(each.t5) == length]
            hidden = self.t5(torch.tensor([tokens[i].t5 for i in places], device=self.device)).cpu()
            out.update(zip(places, hidden, strict=True))
        return [out[i] for i in range(len(tokens))]


def load_clip(source: Path, role: Literal["clip_l", "clip_g"]) -> ClipEncoder:
    """A CLIP text model from :func:`read_state`'s sources."""
    return ClipEncoder(read_state(source, role), role, str(source))


def load_t5(source: Path) -> T5Encoder:
    """A T5 encoder from :func:`read_state`'s sources."""
    return T5Encoder(read_state(source, "t5xxl"), str(source))


def read_state(source: Path, role: Role) -> dict[str, torch.Tensor]:
    """The tensors of a text encoder, in the types they are stored in.

    Args:
        source: a file with the encoder alone, a checkpoint that holds it (``text_encoders.clip_l.transformer.*``), or a
            diffusers folder (``text_encoder``, ``text_encoder_2``, ``text_encoder_3``).
        role: which one to take from a checkpoint.

    Raises:
        CheckpointError: the source is missing or cannot be read.
    """
    prefix = f"text_encoders.{role}.transformer."
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(source):
        names = list(files.read_metadata(path)[0])
        inside = any(name.startswith(prefix) for name in names)
        with files.tensors_of(path) as file:
            for name in names:
                if not inside or name.startswith(prefix):
                    state[name.removeprefix(prefix)] = file.get_tensor(name)
    return state


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a text encoder: the file itself, or those of a diffusers folder.

    Raises:
        CheckpointError: the folder holds none.
    """
    if not source.is_dir():
        return [source]
    for index in sorted(source.glob("model.safetensors.index*.json")):
        return [source / name for name in sorted(set(shard_names(index).values()))]
    for name in ("model.safetensors", "model.fp16.safetensors"):
        if (source / name).is_file():
            return [source / name]
    raise CheckpointError(
        f"the folder {source} holds no model.safetensors; give a file, or a text encoder's folder of diffusers' layout"
    )


def _tensor(state: State, name: str, role: str, file: str) -> torch.Tensor:
    if name not in state:
        quantised = any(key.endswith(".comfy_quant") for key in state)
        why = "it is quantised; use the fp16 or fp8 file" if quantised else f"is it a {role} in transformers' names?"
        raise CheckpointError(f"{file} has no tensor {name}: {why}")
    return state[name]


def _shape(state: State, name: str, role: str, file: str) -> tuple[int, int]:
    """Rows and columns of a matrix; where it is the embedding, its width is checked against the role's."""
    rows, columns = _tensor(state, name, role, file).shape
    if name in (CLIP_EMBEDDING, *T5_EMBEDDINGS) and columns != WIDTHS[role]:
        raise CheckpointError(
            f"{file} is {columns} wide, but the {role} of SD3 is {WIDTHS[role]} wide; were two files swapped?"
        )
    return rows, columns


def _count(state: State, pattern: str) -> int:
    """Layers with the numbers 0, 1, ... without a gap."""
    numbers = {int(found[1]) for name in state if (found := re.fullmatch(pattern, name))}
    return next(n for n in range(len(numbers) + 1) if n not in numbers)


def _fill(model: nn.Module, state: State, file: str) -> None:
    """Give a model on the meta device its weights, as they are stored, to be read in fp32.

    Raises:
        CheckpointError: one is missing or has the wrong shape.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in state or state[name].shape != shape:
            has = f"has {list(state[name].shape)}" if name in state else "is missing"
            raise CheckpointError(f"{file}: the tensor {name} {has}, expected {list(shape)}")
    model.load_state_dict({name: state[name] for name in wanted}, assign=True)
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:  # the positions 0, 1, ... of CLIP, which no file needs to hold
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    for prefix, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            if module.weight.dtype in FLOAT8:  # it has no lookup; ComfyUI takes what is not a number in it for 0
                module.weight = nn.Parameter(torch.nan_to_num(module.weight.half()), requires_grad=False)
            module.register_forward_hook(_rows_in_float32)
            continue
        for part, weight in list(module.named_parameters(recurse=False)):
            scale = state.get(f"{prefix}.{SCALE}") if part == "weight" else None
            if weight.dtype != torch.float32 or scale is not None:
                parametrize.register_parametrization(module, part, _InFloat32(scale), unsafe=True)
