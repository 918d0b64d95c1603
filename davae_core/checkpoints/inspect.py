"""Say what a file or folder is: ``python -m davae_core.checkpoints.inspect FILE``. Only headers are read.

With ``--verify`` every number is. Kind, configuration, dtypes, sizes and metadata of anything that ``convert`` reads,
and of native files; ``--json`` for programs.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from .. import command
from ..adapter import AdapterConfig
from ..autoencoder import AutoencoderConfig
from ..davae import DAVAEConfig
from ..errors import CheckpointError, DAVAEError
from ..mmdit import MMDiTConfig
from ..predictor import PredictorConfig
from ..tiny_decoder import TinyDecoderConfig
from . import files, foreign_json, metadata
from .belonging import WITH_LATENT, belonging
from .opening import Opened, open_any
from .tensors import Tensors


def describe(path: Path) -> dict[str, Any]:
    """What there is to say, as JSON values.

    Raises:
        CheckpointError: the file cannot be read.
    """
    opened = open_any(path, most=0)
    return {
        "path": str(path),
        "kind": opened.detected.kind,
        "description": opened.detected.description,
        "base": _base(opened),
        **_sizes(opened.stored),
        "config": _config(opened),
        "parts": {
            name: {**_sizes(part.native), "config": _part_config(name, part.native)}
            for name, part in opened.parts.items()
        },
        "metadata": {name: _value(text) for name, text in sorted(opened.told.items())},
    }


def _base(opened: Opened) -> dict[str, str] | None:
    """The base model whose latent it is made for, and what tells so."""
    try:
        told = belonging(opened)
    except DAVAEError:  # said by the configuration
        return None
    return {"name": told.name, "title": told.title, "by": told.by} if told.name else None


def _sizes(tensors: Tensors) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "parameters": tensors.parameters,
        "bytes": tensors.bytes,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in tensors.dtypes],
    }


def _config(opened: Opened) -> dict[str, Any] | None:
    """The configuration of a native file: what the shapes tell, and what the metadata tells; no defaults."""
    kind, meta, file = opened.detected.kind, opened.stored.meta, opened.path.name
    if kind not in WITH_LATENT:
        return None
    try:
        latent, recommended = metadata.latent_of(metadata.parse(opened.told, cast(metadata.Kind, kind), file), file)
        told = {"latent": asdict(latent), "recommended": {k: v for k, v in asdict(recommended).items() if v}}
        if kind == "autoencoder":
            found = DAVAEConfig.from_state_dict(meta)
            shape = {"base": asdict(found.base), "shared_trunk": found.shared_trunk, "base_decoder": found.base_decoder}
            if found.predictor_width:
                shape["predictor"] = {"width": found.predictor_width, "blocks": found.predictor_blocks}
            return shape | told
        if kind == "predictor":
            predictor = PredictorConfig.from_state_dict(meta)
            return {"width": predictor.width, "blocks": predictor.blocks} | told
        if kind == "adapter":
            adapter = AdapterConfig.from_state_dict(meta, latent.base_channels)
            return {"hidden": adapter.hidden, "patch": adapter.patch} | told
        if kind == "tiny_decoder":
            return {"widths": TinyDecoderConfig.from_state_dict(meta, latent).widths} | told
        return told
    except DAVAEError as problem:
        return {"problem": str(problem)}


def verify(path: Path) -> list[str]:
    """Read every number of a file or folder, and compare each safetensors file with its hash: what was found in order.

    Raises:
        CheckpointError: a number is NaN or infinite, or the data is not what the file was saved with.
    """
    opened = open_any(path, most=0)
    for name in opened.stored:
        files.check_finite({name: opened.stored[name]}, opened.path.name)
    compared = 0
    for file, told in opened.sources.items():
        with files.naming(file.relative_to(path).as_posix() if path in file.parents else file.name):
            compared += files.check_hash(file, told, most=None)
    return [f"all {opened.stored.parameters:,} numbers are finite", _compared(compared, len(opened.sources))]


def _compared(count: int, of: int) -> str:
    """How many files' data was compared with a hash, and found right."""
    if of <= 1:
        return "the data is what it was saved with" if count else "it holds no hash to compare the data with"
    said = f"the data of {count} of {of} files is what it was saved with"
    return said if count == of else f"{said}; {of - count} hold no hash to compare it with"


def _part_config(name: str, native: Tensors) -> dict[str, Any] | None:
    try:
        if name == "diffusion_model":
            return asdict(MMDiTConfig.from_state_dict(native.meta))
        if name == "vae":
            return asdict(AutoencoderConfig.from_state_dict(native.meta))
    except DAVAEError as problem:
        return {"problem": str(problem)}
    return None


def _value(text: str) -> Any:
    """A metadata entry, read where it is JSON."""
    try:
        return foreign_json.value(text, "metadata") if text[:1] in "{[" else text
    except CheckpointError:
        return text


def text(told: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{told['path']}: {told['description']}", f"  kind: {told['kind']}", f"  {_size_line(told)}"]
    if base := told["base"]:
        of = f"the VAE of {base['title']} ({base['name']})" if base["title"] else base["name"]
        lines.append(f"  base: {of}, told by {base['by']}")
    lines += _config_lines(told["config"], "  ")
    for name, part in told["parts"].items():
        lines += [f"  {name}", f"    {_size_line(part)}", *_config_lines(part["config"], "    ")]
    told_twice = {metadata.CONFIG} if told["config"] and "problem" not in told["config"] else set()
    for name, value in told["metadata"].items():
        if name in told_twice:
            continue
        if name == metadata.HISTORY and isinstance(value, dict):
            lines += _history_lines(value)
            continue
        lines.append(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")
    lines += [f"  verified: {line}" for line in told.get("verified", [])]
    return "\n".join(lines)


def _history_lines(told: dict[str, Any]) -> list[str]:
    """A history without the values by which models are known again, which say nothing to people."""
    lines = ["  history"]
    lines += [
        f"    {name}: {json.dumps(told[name])}" for name in ("recipe", "steps", "learning_rate", "seed") if name in told
    ]
    of = told.get("of")
    for role, model in (of if isinstance(of, dict) else {}).items():
        lines.append(f"    {role}: {model.get('name', '') if isinstance(model, dict) else ''}")
    settings = told.get("settings")
    return lines + [
        f"    {name}: {json.dumps(value)}" for name, value in (settings if isinstance(settings, dict) else {}).items()
    ]


def _size_line(told: dict[str, Any]) -> str:
    size = told["bytes"] / 1e9
    shown = f"{size:.2f} GB" if size >= 0.1 else f"{told['bytes'] / 1e6:.2f} MB"
    return f"{told['tensors']} tensors, {told['parameters']:,} parameters, {shown}, {', '.join(told['dtypes'])}"


def _config_lines(config: dict[str, Any] | None, indent: str) -> list[str]:
    return [f"{indent}{name}: {json.dumps(value)}" for name, value in (config or {}).items()]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.checkpoints.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("path", type=Path, help="a file or folder")
    out.add_argument("--json", action="store_true", help="print JSON")
    out.add_argument("--verify", action="store_true", help="read every number, and compare the data with its hash")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; what was said."""
    args = parser().parse_args(argv)
    told = describe(args.path)
    if args.verify:
        told["verified"] = verify(args.path)
    print(json.dumps(told, indent=2) if args.json else text(told))
    return told


if __name__ == "__main__":
    command.run(main)
