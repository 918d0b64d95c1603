"""Read SD3 / SD3.5, its VAE, or the authors' release in any known layout, and write native files.

    python -m davae_core.checkpoints.convert SRC DST

SRC is a file or folder; what it is, is told from names and shapes. DST is a file where SRC holds one model, and a
folder with one file for each where it holds several (diffusion_model, vae, clip_l, clip_g, t5xxl; --part takes one).
Everything is run in both layouts on the same input before anything is written. With --to diffusers, DST becomes a
folder that diffusers loads. What the source is read from is never replaced, and other files only with --overwrite.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import atomic, command
from ..adapter import Recommended
from ..bases import BASE_KEY, BASES, SD3
from ..errors import CheckpointError
from ..history import History, identity
from ..latent import LatentSpec
from ..mmdit import MMDiTConfig
from . import (
    authors_adapter,
    authors_autoencoder,
    export,
    files,
    foreign_json,
    lora,
    metadata,
    native,
    outputs,
    settings,
    tensors,
    to_diffusers,
    verify,
)
from .belonging import WITH_LATENT, base_told, belonging
from .opening import Opened, Part, open_any


def convert(args: argparse.Namespace) -> list[Path]:
    """Do what the command line says; the files or folders that were written.

    Raises:
        DAVAEError: the source cannot be converted; nothing was written.
    """
    _recommended(args)
    opened = open_any(args.src, most=None)
    base = open_any(args.base, most=None) if args.base is not None else None
    print(f"{args.src}: {opened.detected.description}")
    for name, part in opened.parts.items():
        print(f"  {name}: {part.native.parameters:,} parameters, {part.native.bytes / 1e9:.2f} GB")
    if args.to == "diffusers":
        return [_export(args, opened, base)]
    if opened.detected.kind == "authors autoencoder":
        return [_authors_autoencoder(args, opened, base)]
    if opened.detected.kind == "authors adapter":
        return [_authors_adapter(args, opened, base)]
    if opened.detected.kind in {*WITH_LATENT, "text_encoder"} - {"model"}:
        raise CheckpointError(f"{args.src} is {opened.detected.description}, a native file already")
    return _parts(args, opened)


def _parts(args: argparse.Namespace, opened: Opened) -> list[Path]:
    """Every model of the source, or the one that is asked for, as a file of its own."""
    chosen = _chosen(args, opened)
    if len(chosen) > 1 and files.is_safetensors(args.dst):
        raise CheckpointError(
            f"{args.src} holds {', '.join(chosen)}, which do not go into one file; name a folder, or one with --part"
        )
    paths = {name: _file(args, name) for name in chosen}
    outputs.check(paths.values(), outputs.read_from(opened), args.overwrite)
    told = {name: _metadata(args, opened, name, part) for name, part in chosen.items()}
    for name, part in chosen.items():
        files.check_finite(part.native, part.file)
        _report(name, _verify(name, part))
    for name, part in chosen.items():
        tensors.write(paths[name], part.native, told[name])
    return list(paths.values())


def _chosen(args: argparse.Namespace, opened: Opened) -> dict[str, Part]:
    if not opened.parts:
        raise CheckpointError(f"{args.src} is {opened.detected.description}, which cannot be converted")
    if args.part is None:
        return dict(opened.parts)
    if args.part not in opened.parts:
        raise CheckpointError(f"{args.src} holds {', '.join(opened.parts)}, not {args.part}")
    return {args.part: opened.parts[args.part]}


def _verify(name: str, part: Part) -> float | None:
    """The largest relative difference; None where the names alone change, and the model could be built and run."""
    if name not in ("diffusion_model", "vae"):
        return None
    with files.naming(part.file):
        run = verify.mmdit if name == "diffusion_model" else verify.autoencoder
        difference = run(part.native, part.theirs, part.file)
    return difference if part.theirs is not None else None


def _report(name: str, difference: float | None) -> None:
    compared = (
        "the same tensors under other names" if difference is None else f"differ by {difference:.1e} of the largest"
    )
    print(f"  {name}: {compared}")


def _about(args: argparse.Namespace, opened: Opened, name: str) -> metadata.About:
    """What is told of a model of the source: by the command line, else by the source, which may hold several."""
    folder = opened.path / export.PARTS.get(name, "")
    own = next((file for file in opened.sources if file.parent == folder), None)
    if own is not None:  # diffusers' layout, with a file or shards for each
        about = metadata.about(opened.sources[own], own.name)
    else:
        about = metadata.about(opened.told, opened.path.name)
        if len(opened.parts) > 1 and about.title:
            about = replace(about, title=f"{about.title}: {name}")
    return about.told(_given(args))


def _metadata(args: argparse.Namespace, opened: Opened, name: str, part: Part) -> dict[str, str]:
    """Metadata of a base model, or of a merged one where it speaks more channels than a base model does."""
    about = _about(args, opened, name)
    plain = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": name, "format": "pt", **about.metadata()}
    if name == "vae":
        base = base_told(opened, part, args.family)
        return plain | ({BASE_KEY: base.name} if base else {})
    if name != "diffusion_model":
        return plain
    if metadata.kind_of(opened.told) == "model":
        config = metadata.parse(opened.told, "model", opened.path.name)
        latent, own = metadata.latent_of(config, opened.path.name)
        return {**opened.told, **_merged(latent, metadata.recommended(own, _recommended(args)), about)}
    with files.naming(part.file):
        channels = MMDiTConfig.from_state_dict(part.native.meta).in_channels
    if channels in {base.latent_channels for base in BASES.values() if base.diffusion}:
        return plain
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    beside = [place / export.LATENT for place in (folder, folder.parent) if (place / export.LATENT).is_file()]
    if not beside:
        raise CheckpointError(
            f"{args.src} reads {channels} channels and does not tell what they are; put the {export.LATENT} beside it "
            "that belongs to it, or convert base model and adapter and merge them"
        )
    config = foreign_json.read(beside[0])
    latent, own = metadata.latent_of(config, beside[0].name)
    if latent.channels != channels:
        raise CheckpointError(f"{beside[0]} tells of {latent.channels} channels, the model reads {channels}")
    about = metadata.about_json(config, beside[0].name).told(_given(args))
    return _merged(latent, metadata.recommended(own, _recommended(args)), about)


def _merged(latent: LatentSpec, recommended: Recommended, about: metadata.About) -> dict[str, str]:
    words = {**about.words, "title": about.title or "DA-VAE merged model"}
    return metadata.build("model", metadata.latent_config(latent, recommended), **words, history=about.history)


def _statistics(args: argparse.Namespace, opened: Opened) -> Path:
    beside = opened.path.parent / authors_autoencoder.STATISTICS
    path = args.statistics or beside
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there. The release normalises the detail channels by statistics that lie in a file of "
            "their own; name it with --statistics, or if there was none, one with mean 0 and std 1 for each channel"
        )
    return path


def _file(args: argparse.Namespace, name: str) -> Path:
    return args.dst if files.is_safetensors(args.dst) else args.dst / f"{name}.safetensors"


def _given(args: argparse.Namespace) -> dict[str, str]:
    return {"title": args.title, "author": args.author, "licence": args.licence}


def _words(args: argparse.Namespace, default: str) -> dict[str, Any]:
    return {**_given(args), "title": args.title or default}


def _authors_autoencoder(args: argparse.Namespace, opened: Opened, given: Opened | None) -> Path:
    base, path, statistics = None, _file(args, "autoencoder"), _statistics(args, opened)
    outputs.check([path], [*outputs.read_from(opened), *outputs.read_from(given), statistics], args.overwrite)
    if given is not None:
        if "vae" not in given.parts:
            raise CheckpointError(f"{args.base} holds no VAE; name the SD3 VAE with --base")
        told = belonging(given)
        if told.name not in ("", SD3.name):
            raise CheckpointError(
                f"{args.base} holds the VAE of {told.title or told.name} (told by {told.by}), and the release stands "
                "on that of SD3; name that with --base"
            )
        base = export.as_diffusers(given.parts["vae"])
    with files.naming(opened.path.name):
        model, difference = authors_autoencoder.convert(opened.stored, statistics, opened.path.name, base)
    trunk = "shared with the base encoder" if model.config.shared_trunk else "its own"
    print(f"  {model.latent.base_channels} base + {model.latent.detail_channels} detail channels, detail trunk {trunk}")
    _report("autoencoder", difference)
    native.save_autoencoder(path, model, _recommended(args), **_words(args, "DA-VAE autoencoder"))
    return path


def _authors_adapter(args: argparse.Namespace, opened: Opened, given: Opened | None) -> Path:
    if given is None:
        raise CheckpointError(
            f"{args.src} holds trained layers, and an adapter holds what changed; name the SD3.5 model that it was "
            "trained from with --base"
        )
    base = given.parts.get("diffusion_model")
    if base is None:
        raise CheckpointError(f"{args.base} holds no SD3 / SD3.5 diffusion model; name one with --base")
    name = opened.path.name
    path, statistics, step = _file(args, "adapter"), _statistics(args, opened), opened.content.get("global_step")
    place = None
    if args.lora != "none":
        place = Path(args.lora) if args.lora else authors_adapter.find_lora(opened.path, step)
    beside = [statistics, *(outputs.below(place) if place else [])]
    outputs.check([path], [*outputs.read_from(opened), *outputs.read_from(given), *beside], args.overwrite)
    average = {"auto": None, "average": True, "last": False}[args.weights]
    trained = authors_adapter.read(opened.content, name, average)
    print(f"  weights: {'the running average (EMA)' if trained.average else 'the last step'}")
    loras = {}
    if place is not None:
        loras = lora.read(place)
        print(f"  LoRA: {place}, {len(loras) // 3} modules")
        if trained.lora is not None:  # the folder's LoRA is that of the last step; its alphas hold for both
            averaged = lora.renamed(trained.lora, lora.LoraScale(), name)
            loras |= {key: tensor for key, tensor in averaged.items() if not key.endswith(".alpha")}
    with files.naming(name):
        made, difference = authors_adapter.convert(trained, loras, base.native, statistics, name, _recommended(args))
    _report("adapter", difference)
    history = History(
        steps=step if type(step) is int else 0, of={"base_model": identity("base_model", base.native, args.base.name)}
    )
    native.save_adapter(path, made, **_words(args, "DA-VAE adapter"), history=history)
    return path


def _recommended(args: argparse.Namespace) -> Recommended:
    """The settings to recommend that the command line gives, 0 where it gives none; others than files may carry are
    refused."""
    names = settings.RECOMMENDED
    return Recommended(**{name: names[name].read(f"--{name}", getattr(args, name)) for name in names})


def _export(args: argparse.Namespace, opened: Opened, base: Opened | None) -> Path:
    """A folder for diffusers."""
    kind = opened.detected.kind
    chosen = {} if kind in to_diffusers.OURS else _chosen(args, opened)
    writable = {name: part for name, part in chosen.items() if name in export.PARTS}
    if chosen and not writable:
        raise CheckpointError(
            f"{', '.join(chosen)} cannot be written for diffusers, {' and '.join(export.PARTS)} can; of {args.src} "
            f"take --part {' or --part '.join(name for name in opened.parts if name in export.PARTS)}"
        )
    with atomic.writing_folder(args.dst) as folder, files.naming(opened.path.name):
        about = {name: _about(args, opened, name) for name in (writable or [kind])}
        if writable:
            differences = to_diffusers.parts(folder, opened, writable, about, args.family)
        else:
            differences = to_diffusers.ours(folder, opened, base)
        for name, difference in differences.items():
            _report(name, difference)
        if kind in to_diffusers.OURS or metadata.kind_of(opened.told) == "model":
            to_diffusers.latent(folder, opened, next(iter(about.values())), _recommended(args))
    return args.dst


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.checkpoints.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("src", type=Path, help="a file or folder")
    out.add_argument("dst", type=Path, help="a .safetensors or .sft file, or a folder")
    out.add_argument(
        "--overwrite", action="store_true", help="replace files that are there already; a folder for diffusers is not"
    )
    out.add_argument("--to", choices=("native", "diffusers"), default="native", help="(default: native)")
    out.add_argument("--part", help="the model to take from a source that holds several")
    out.add_argument("--base", type=Path, metavar="FILE", help="the base model or base VAE, where SRC needs one")
    out.add_argument(
        "--family",
        choices=tuple(BASES),
        default="",
        help="base model of a plain VAE; SD1 and SDXL, SD3 and FLUX.1 share their shapes",
    )
    out.add_argument(
        "--statistics", type=Path, metavar="FILE", help="statistics of the authors' autoencoder (default: beside SRC)"
    )
    out.add_argument("--lora", metavar="FOLDER", help="LoRA of the authors' adapter, or none (default: beside SRC)")
    out.add_argument(
        "--weights",
        choices=("auto", "average", "last"),
        default="auto",
        help="weights of the authors' adapter: running average (EMA) or last step (default: the average, if any)",
    )
    for name, kind, help_text in (
        ("size", int, "image side"),
        ("shift", float, "time shift"),
        ("cfg", float, "guidance scale"),
        ("steps", int, "steps"),
    ):
        out.add_argument(f"--{name}", type=kind, default=kind(0), help=f"to recommend for sampling: {help_text}")
    for name in ("title", "author", "licence"):
        out.add_argument(f"--{name}", default="", help="(default: the source's)")
    return out


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run from the command line; the files or folders that were written."""
    written = convert(parser().parse_args(argv))
    for path in written:
        print(f"written: {path}")
    return written


if __name__ == "__main__":
    command.run(main)
