"""Put a finished family into the pack: fp16, with titles and licences.

python -m davae_core.training.tiny.install --size micro
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro

from ... import checkpoints, command, images, tiny
from ...checkpoints import files, metadata
from ...davae import DAVAE
from ...errors import DAVAEError
from ...preview import fit_preview
from ..places import folder
from ..stages import STAGES

AUTHOR = "DA-VAE node pack"
LICENCE = "Apache-2.0; trained on Fluent Emoji (MIT), Noto Emoji (Apache-2.0) and Twemoji (CC-BY-4.0)"
LIMIT = 40 * 2**20
# The trainings whose files ship.
LAST = ("base_dit", "autoencoder_redrawn", "adapter_finish", "few_steps", "predictor_finish", "tiny_decoder")


@dataclass(frozen=True)
class InstallConfig:
    """Which family, and where to."""

    size: Literal["micro", "tiny"] = "tiny"
    """Size of the family, trained into output/tiny/SIZE."""
    into: Path = Path(tiny.__file__).parent
    """Folder with a folder for each kind of model."""


def install(config: InstallConfig) -> list[Path]:
    """Write the files in fp16, one of each kind; returns their paths.

    Raises:
        CheckpointError: a stage of this size has not finished.
    """
    stage = {name: folder(config.size, name) for name in LAST}
    state, _ = files.read(stage["base_dit"] / tiny.MODEL)
    encoder = checkpoints.load_text_encoder(stage["base_dit"] / tiny.TEXT_ENCODER)
    trained = stage["autoencoder_redrawn"] / tiny.AUTOENCODER
    davae = checkpoints.load_autoencoder(trained, torch.float32)
    history = metadata.history_of(files.read_metadata(trained)[1], trained.name)
    adapter = checkpoints.load_adapter(stage["adapter_finish"] / tiny.ADAPTER)
    predictor = checkpoints.load_predictor(stage["predictor_finish"] / tiny.PREDICTOR)
    decoder = checkpoints.load_tiny_decoder(stage["tiny_decoder"] / tiny.DECODER)
    few_steps = checkpoints.load_few_step_lora(stage["few_steps"] / tiny.FEW_STEPS)
    told = STAGES["adapter"].recipes[config.size][1].recommended  # chosen by what the trained family draws
    preview = preview_of(davae, folder(config.size, "data") / "train")
    davae.config = replace(davae.config, latent=replace(davae.latent, preview=preview))
    latent = replace(adapter.config.latent, preview=preview)
    half = replace(
        adapter,
        config=replace(adapter.config, latent=latent, recommended=told),
        state={name: tensor.half() for name, tensor in adapter.state.items()},
    )
    out = {kind: config.into / kind for kind in tiny.FOLDERS}
    paths = [
        out["diffusion_models"] / tiny.MODEL,
        out["text_encoders"] / tiny.TEXT_ENCODER,
        out["vae"] / tiny.AUTOENCODER,
        out["loras"] / tiny.ADAPTER,
        out["latent_upscale_models"] / tiny.PREDICTOR,
        out["vae_approx"] / tiny.DECODER,
        out["loras"] / tiny.FEW_STEPS,
    ]
    by: dict[str, Any] = {"author": AUTHOR, "licence": LICENCE}
    about = {"modelspec.title": "Tiny SD3.5", "modelspec.author": AUTHOR, "modelspec.license": LICENCE}
    about[tiny.PREVIEW] = json.dumps(preview)
    files.save(paths[0], {name: tensor.half() for name, tensor in state.items()}, about)
    checkpoints.save_text_encoder(paths[1], encoder.half(), title="Tiny text encoder", **by)
    checkpoints.save_autoencoder(paths[2], davae.half(), told, title="Tiny DA-VAE", history=history, **by)
    checkpoints.save_adapter(paths[3], half, title="Tiny DA-VAE adapter", **by)
    checkpoints.save_predictor(
        paths[4], predictor.half(), title="Tiny detail predictor", history=predictor.history, **by
    )
    checkpoints.save_tiny_decoder(paths[5], decoder.half(), title="Tiny decoder", history=decoder.history, **by)
    few_steps = replace(few_steps, state={name: tensor.half() for name, tensor in few_steps.state.items()})
    checkpoints.save_few_step_lora(paths[6], few_steps, title="Tiny few-step LoRA", **by)
    for path in paths:
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path}")
    total = sum(path.stat().st_size for path in paths)
    print(f"{total / 2**20:6.2f} MiB  in all (limit {LIMIT / 2**20:.0f})")
    return paths


@torch.no_grad()
def preview_of(davae: DAVAE, folder: Path) -> tuple[float, ...]:
    """The preview colours of the base channels, measured on every eighth image in ``folder``.

    Raises:
        DAVAEError: there are no images.
    """
    paths = sorted(folder.rglob("*.png"))[::8]
    if not paths:
        raise DAVAEError(f"{folder} holds no images; prepare the data: python -m davae_core.training.tiny.data")
    x = torch.stack([images.read_image(path) for path in paths])
    z = torch.cat([davae.encode_base(part) for part in x.split(16)])
    colours = F.avg_pool2d(x, davae.latent.factor)
    return fit_preview(davae.latent.normalise_base(z), colours)


def main(args: list[str] | None = None) -> int:
    """Install from the command line."""
    install(tyro.cli(InstallConfig, description=__doc__, args=args))
    return 0


if __name__ == "__main__":
    command.run(main)
