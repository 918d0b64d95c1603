"""Compute the latents of all images of an adapter training once, so that it needs no DA-VAE on the GPU.

    python -m davae_core.training latents --data.images photos --data.size 1024 --autoencoder davae.safetensors \\
        --out latents

A latent is found again by the pixels of its image, as they are after cropping and mirroring: use the same images, size,
buckets and flip as in the training, and no random crops. What is not yet written, or damaged, is computed when the
command is run again.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.utils.data import DataLoader
from tqdm import tqdm

from ... import checkpoints, records
from ...davae import DAVAE
from ...errors import DAVAEError
from ...mmdit import MMDiTConfig
from .batches import Draw, sample_seed
from .dataset import FLIP, DataConfig, ImageData, Item, nearest_shape, shapes
from .latents import image_key
from .sources import index, sizes

KIND, MAKER = "latents", "python -m davae_core.training latents"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentsConfig:
    """Which images, which DA-VAE, and where the latents go."""

    data: DataConfig
    autoencoder: Path
    """File of the DA-VAE."""
    out: Path
    """Folder for the latents."""
    shard: int = 256
    """Latents in a file; what an interruption costs at most."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Stored numbers. The arithmetic is in fp32."""
    device: str = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise DAVAEError(f"shard must be at least 1, got {self.shard}")
        if self.data.random_crop:
            raise DAVAEError(
                "images that are cropped at random have no latent that could be kept: leave out --data.random-crop, "
                "here and in the training"
            )


class StoredLatents:
    """Images to their latents, by content.

    Args:
        kept: shards of latents.
    """

    def __init__(self, kept: records.RecordSet) -> None:
        self.kept = kept

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The latents of images ``[B, 3, H, W]``, in the model's units, fp32 on the device of the images.

        Raises:
            DAVAEError: an image was not encoded.
        """
        keys = [image_key(image).hex() for image in x]
        missing = sum(key not in self.kept for key in keys)
        if missing:
            raise DAVAEError(
                f"{self.kept.folder} has no latent of {missing} of {len(keys)} images of a batch; run {MAKER} again "
                "with the --data.images, size, buckets and flip of this training (random crops cannot be kept)"
            )
        return torch.stack([self.kept.get(key, ["z"])[0].float() for key in keys]).to(x.device)


def load_latents(folder: Path, autoencoder: Path) -> StoredLatents:
    """Open a finished set of latents.

    Raises:
        DAVAEError: it is not finished or damaged, or was made with another DA-VAE than the file ``autoencoder``.
    """
    kept = records.RecordSet(folder, KIND, MAKER)
    if kept.about["autoencoder"] != records.fingerprint([autoencoder]):
        raise DAVAEError(
            f"the latents in {folder} are not of the DA-VAE {autoencoder}; give the one they were made with, or make "
            f"them anew in another folder ({MAKER})"
        )
    return StoredLatents(kept)


def items(config: DataConfig, multiple: int) -> Iterator[Item]:
    """Every image as the training sees it, and its mirror image where that is asked for too; without unreadable ones.

    Args:
        config: the images.
        multiple: sides are multiples of it.
    """
    cuts = shapes(config.size, multiple, config.buckets)
    sources = index(config.images)
    bucket_of = [0] * len(sources)
    if config.buckets:
        bucket_of = [nearest_shape(size or (1, 1), cuts) for size in sizes(sources)]
    # Seeds of draws that leave an image as it is and that mirror it.
    straight, mirrored = (next(seed for seed in range(64) if sample_seed(seed, FLIP) % 2 == want) for want in (0, 1))
    seeds = (straight, mirrored) if config.flip else (straight,)
    draws = [Draw(i, 0, 0, 0, seed) for i in range(len(sources)) for seed in seeds]
    data = ImageData(sources, cuts, bucket_of, replace(config, cache=False, max_broken=0))
    loading: DataLoader = DataLoader(data, batch_size=None, sampler=draws, num_workers=config.workers)
    for item in loading:
        if item["broken"]:
            logger.warning("could not read %s: it has no latent", item["broken"][0])
        else:
            yield item


@torch.no_grad()
def encode_all(davae: DAVAE, found: Iterator[Item], out: Path, about: dict[str, Any], config: LatentsConfig) -> int:
    """Encode the images that are missing in ``out``; returns how many.

    Each is encoded by itself, because the last bits of a latent depend on the size of the batch.

    Raises:
        DAVAEError: ``out`` was made with another DA-VAE; a latent cannot be stored.
    """
    there = records.survey(out, KIND, about)
    for path in there.damaged:
        logger.warning("%s is damaged: its images are encoded again", path)
        path.unlink()
    known, free, done = there.keys, there.free, 0
    device = next(davae.parameters()).device
    made: dict[str, records.Record] = {}
    for item in tqdm(found, unit="image"):
        key = image_key(item["image"]).hex()
        if key in known:
            continue
        z = davae.latent.normalise(davae.encode(item["image"][None].to(device)).float())[0].cpu()
        made[key] = records.stored({"z": z}, records.DTYPES[config.dtype], item["name"])
        known.add(key)
        done += 1
        if len(made) == config.shard:
            records.write(out, next(free), made, KIND, about)
            made = {}
    if made:
        records.write(out, next(free), made, KIND, about)
    records.finish(out, KIND, about)
    return done


def main(args: list[str] | None = None) -> int:
    """Compute latents from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(LatentsConfig, description=__doc__, args=args)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    davae = checkpoints.load_autoencoder(config.autoencoder, torch.float32).requires_grad_(False).to(device)
    about = {"autoencoder": records.fingerprint([config.autoencoder]), "dtype": config.dtype}
    found = items(config.data, davae.latent.factor * MMDiTConfig.patch)
    done = encode_all(davae, found, config.out, about, config)
    logger.info("%d latents were added to %s", done, config.out)
    return 0
