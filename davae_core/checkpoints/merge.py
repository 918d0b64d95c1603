"""Make one model out of a base model and an adapter, tensor by tensor: ``python -m davae_core.checkpoints.merge``.

The base may lie in any layout that :mod:`.opening` reads. Memory is needed for the adapter and one tensor of the base.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import command, history
from ..adapter import WIDENED, Adapter, widen
from ..errors import CheckpointError, DAVAEError
from ..lora import LORA_MODULES, lora_deltas
from . import files, layout, metadata, native, outputs, tensors
from .opening import open_any
from .tensors import Tensors

_LORA = re.compile(r"transformer\.transformer_blocks\.(\d+)\.(.+)\.(?:lora_[AB]\.weight|alpha)")


def merged(
    base: Tensors, adapter: Adapter, strength: float = 1.0, file: str = "the base model", by: str = "the adapter"
) -> Tensors:
    """As :func:`davae_core.adapter.merge`, with each tensor made when it is asked for.

    Args:
        base: the pretrained diffusion model in native names.
        adapter: what to apply.
        strength: factor on what the adapter changes in the pretrained weights.
        file, by: names of the base and of the adapter, for messages.

    Raises:
        DAVAEError: the adapter is for another model, or the base is not whole or quantised.
    """
    with files.naming(file):
        layout.diffusion_model(base.meta, file)
    files.check_finite({name: base[name] for name in WIDENED}, file)
    with files.naming(by):
        wide = widen({name: base[name] for name in WIDENED}, adapter, strength)
        parts = _by_weight(adapter)
        if lacking := [name for name in parts if name not in base]:
            raise DAVAEError(
                f"the adapter changes {lacking[0]}, which the model does not have; use the model it was trained for"
            )

    def make(name: str) -> torch.Tensor:
        if name in wide:
            return wide[name]
        weight = base[name]
        files.check_finite({name: weight}, file)
        if name not in parts:
            return weight
        with files.naming(by):
            return _changed(weight, name, parts[name], strength)

    return Tensors(base.meta | {name: tensor.to("meta") for name, tensor in wide.items()}, make)


def _by_weight(adapter: Adapter) -> dict[str, Adapter]:
    """The LoRA of each weight that it changes, as an adapter of its own."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter.lora_state().items():
        match = _LORA.fullmatch(name)
        if match is None or match[2] not in LORA_MODULES:
            raise CheckpointError(f"unknown tensor in the adapter: {name}")
        weight = f"joint_blocks.{match[1]}.{LORA_MODULES[match[2]][0]}.weight"
        states.setdefault(weight, {})[name] = tensor
    return {weight: Adapter(adapter.config, state) for weight, state in states.items()}


def _changed(weight: torch.Tensor, name: str, part: Adapter, strength: float) -> torch.Tensor:
    weight = weight.clone()
    for _, third, delta in lora_deltas(part.state):
        rows = weight if third is None else weight.chunk(3)[third]
        if rows.shape != delta.shape:
            raise DAVAEError(f"the adapter's change of {name} is {list(delta.shape)}, expected {list(rows.shape)}")
        rows.copy_(rows.float() + strength * delta)
    return weight


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.checkpoints.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("base", type=Path, help="the base model: a file, or a diffusers folder")
    out.add_argument("adapter", type=Path, help="a DA-VAE adapter")
    out.add_argument("out", type=Path, help="the merged model, a .safetensors file")
    out.add_argument("--strength", type=float, default=1.0, help="strength of the adapter's changes (default: 1)")
    out.add_argument("--title", default="DA-VAE merged model")
    out.add_argument("--author", default="", help="(default: the adapter's)")
    out.add_argument("--licence", default="", help="(default: the adapter's)")
    out.add_argument("--overwrite", action="store_true", help="replace OUT where it is there already")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    args = parser().parse_args(argv)
    if not files.is_safetensors(args.out):
        raise CheckpointError(f"the merged model must be a .safetensors file, got {args.out.name}")
    if not math.isfinite(args.strength):
        raise CheckpointError(f"--strength must be a number, got {args.strength}")
    opened = open_any(args.base, most=None)
    print(f"{args.base}: {opened.detected.description}")
    if "diffusion_model" not in opened.parts:
        raise CheckpointError(f"{args.base} is {opened.detected.description}, expected an SD3 / SD3.5 model")
    outputs.check([args.out], [*outputs.read_from(opened), args.adapter], args.overwrite)
    adapter = native.load_adapter(args.adapter)
    config = metadata.latent_config(adapter.config.latent, adapter.config.recommended)
    by = metadata.about(files.read_metadata(args.adapter)[1], args.adapter.name)
    by = by.told({"title": args.title, "author": args.author, "licence": args.licence})
    told = metadata.build("model", config, **by.words, history=adapter.history)
    base = opened.parts["diffusion_model"].native
    if words := history.mismatch(adapter.history, "base_model", base):
        print(f"note: {args.adapter.name} was {words}: {args.base}")
    made = merged(base, adapter, args.strength, opened.path.name, args.adapter.name)
    tensors.write(args.out, made, told)
    print(f"{args.out}: {made.parameters:,} parameters, {made.bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    command.run(main)
