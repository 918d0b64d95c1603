"""Compute the latents of all images of an adapter training once, so that it needs no DA-VAE on the GPU.

    python -m davae_core.training latents --data.images photos --data.size 1024 --autoencoder davae.safetensors \\
        --out latents

A latent is found again by its image (a fingerprint of the encoded file, wherever it lies), the crop and the mirroring:
use the same size, buckets and flip as in the training, and no random crops. Images that are held out have latents too.
What is not yet written, or damaged, or of an image that has changed, is computed when the command is run again.
"""

import json
import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.utils.data import DataLoader
from tqdm import tqdm

from ... import atomic, checkpoints, devices, records
from ...checkpoints import foreign_json
from ...davae import DAVAE
from ...errors import DAVAEError
from ...mmdit import MMDiTConfig
from . import survey
from .batches import Draw, sample_seed
from .config import DataConfig
from .dataset import FLIP, ImageData, Item, fixed
from .latents import KEYS, latent_key
from .listing import Source
from .survey import Collection

KIND, MAKER = "latents", "python -m davae_core.training latents"
BROKEN = "unreadable.json"  # reasons by key
RANDOM = (
    "images that are cropped at random have no latent that could be kept: leave out --data.random-crop, here and in "
    "the training"
)

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
    """Latents per file; an interruption costs at most this many."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Precision of the stored numbers; the arithmetic is in fp32."""
    device: str = "auto"
    """Device to compute on; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise DAVAEError(f"shard must be at least 1, got {self.shard}")
        if self.data.random_crop:
            raise DAVAEError(RANDOM)


class StoredLatents:
    """Keys of :func:`davae_core.training.data.latents.latent_key` to latents.

    Args:
        kept: shards of latents.
    """

    def __init__(self, kept: records.RecordSet) -> None:
        self.kept = kept

    def __call__(self, key: str) -> torch.Tensor:
        """The latent ``[c, h, w]`` of a key, in the model's units, fp32.

        Raises:
            DAVAEError: it was not computed.
        """
        if key not in self.kept:
            raise DAVAEError(f"{self.kept.folder} lacks a latent that is asked for; run {MAKER} again")
        return self.kept.get(key, ["z"])[0].float()

    def fitted(self, found: Collection, config: DataConfig) -> Collection:
        """The images of a training without those that had no latent because they could not be read.

        Raises:
            DAVAEError: another image has no latent. Those that have changed since are told from new ones.
        """
        if config.random_crop:
            raise DAVAEError(RANDOM)
        names, ways = set(self.kept.names.values()), (False, True) if config.flip else (False,)
        path = self.kept.folder / BROKEN
        broken = foreign_json.read(path) if path.is_file() else {}
        missing: dict[str, list[str]] = {}

        def there(source: Source, bucket: int, ways: tuple[bool, ...]) -> bool:
            keys = [latent_key(source, found.shapes[bucket], mirrored) for mirrored in ways]
            if reason := next((broken[key] for key in keys if key in broken), None):
                found.table.left_out.setdefault(survey.UNREADABLE, []).append(f"{source.name}: {reason}")
            elif any(key not in self.kept for key in keys):
                known = source.name in names
                why = "have changed since, or are now cut or mirrored in another way" if known else "are not in it"
                missing.setdefault(why, []).append(source.name)
            return reason is None

        pairs = zip(found.sources, found.bucket_of, strict=True)
        trained = [(source, bucket) for source, bucket in pairs if there(source, bucket, ways)]
        pairs = zip(found.held, found.held_bucket_of, strict=True)
        held = [(source, bucket) for source, bucket in pairs if there(source, bucket, (False,))]
        if missing:
            told = "; ".join(f"{len(some)} {why}, for example {some[0]}" for why, some in missing.items())
            raise DAVAEError(
                f"the latents in {self.kept.folder} do not fit this training: of "
                f"{len(found.sources) + len(found.held)} images {told}. "
                f"Run {MAKER} again with its --data.images, size, buckets and flip: it computes only what is missing"
            )
        return replace(
            found,
            sources=[source for source, _ in trained],
            bucket_of=[bucket for _, bucket in trained],
            held=[source for source, _ in held],
            held_bucket_of=[bucket for _, bucket in held],
        )


def load_latents(folder: Path, autoencoder: Path) -> StoredLatents:
    """Open a finished set of latents.

    Raises:
        DAVAEError: it is not finished or damaged, was made with another DA-VAE than the file ``autoencoder``, or by an
            older version that found latents by pixels.
    """
    kept = records.RecordSet(folder, KIND, MAKER)
    if kept.about.get("keys") != KEYS:
        raise DAVAEError(
            f"the latents in {folder} were written by another version, which kept them by "
            f"{kept.about.get('keys', 'the pixels')}, not by {KEYS}; make them anew in another folder ({MAKER})"
        )
    if kept.about["autoencoder"] != records.fingerprint([autoencoder]):
        raise DAVAEError(
            f"the latents in {folder} are not of the DA-VAE {autoencoder}; give the one they were made with, or make "
            f"them anew in another folder ({MAKER})"
        )
    return StoredLatents(kept)


def items(config: DataConfig, found: Collection, known: Container[str]) -> Iterator[tuple[str, Item]]:
    """Key and image of every latent that is not known: each image as the training sees it, and its mirror image where
    that is asked for too. An unreadable one has the reason in ``broken``.

    Args:
        config: how images are cut and mirrored.
        found: the images.
        known: keys of latents that are there.
    """
    sources, buckets = [*found.sources, *found.held], [*found.bucket_of, *found.held_bucket_of]
    # Seeds of draws that leave an image as it is and that mirror it.
    seeds = {
        want: next(seed for seed in range(64) if bool(sample_seed(seed, FLIP) % 2) == want) for want in (False, True)
    }
    wanted: dict[str, Draw] = {}
    for i, source in enumerate(sources):
        for mirrored in (False, True) if config.flip else (False,):
            key = latent_key(source, found.shapes[buckets[i]], mirrored)
            if key not in known:
                wanted.setdefault(key, Draw(i, 0, 0, 0, seeds[mirrored]))
    data = ImageData(sources, found.shapes, buckets, fixed(config))
    loading: DataLoader = DataLoader(data, batch_size=None, sampler=list(wanted.values()), num_workers=config.workers)
    for key, item in zip(tqdm(wanted, unit="image", disable=not wanted), loading, strict=True):
        for name, why in item["broken"].items():
            logger.warning("could not read %s: %s; it has no latent", name, why)
        yield key, item


@torch.no_grad()
def encode_all(davae: DAVAE, found: Collection, out: Path, about: dict[str, Any], config: LatentsConfig) -> int:
    """Encode the images that are missing in ``out``; returns how many latents that were.

    Each is encoded by itself, because the last bits of a latent depend on the size of the batch.

    Raises:
        DAVAEError: ``out`` was made with another DA-VAE or another version; a latent cannot be stored.
    """
    there = records.survey(out, KIND, about)
    for path in there.damaged:
        logger.warning("%s is damaged: its images are encoded again", path)
        path.unlink()
    free, done = there.free, 0
    device = next(davae.parameters()).device
    made: dict[str, records.Record] = {}
    names: dict[str, str] = {}
    broken: dict[str, str] = {}
    for key, item in items(config.data, found, there.keys):
        if item["broken"]:
            broken[key] = "; ".join(item["broken"].values())
            continue
        z = davae.latent.normalise(davae.encode(item["image"][None].to(device)).float())[0].cpu()
        made[key] = records.stored({"z": z}, records.DTYPES[config.dtype], item["name"])
        names[key] = item["name"]
        done += 1
        if len(made) == config.shard:
            records.write(out, next(free), made, KIND, about, names)
            made, names = {}, {}
    if made:
        records.write(out, next(free), made, KIND, about, names)
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(out / BROKEN, json.dumps(broken).encode())
    records.finish(out, KIND, about)
    return done


def compute(config: LatentsConfig) -> int:
    """Compute what is missing; returns how many were added.

    Raises:
        DAVAEError: another process is at work in the folder, or see :func:`encode_all`.
    """
    with records.claimed(config.out):
        return _compute(config)


def _compute(config: LatentsConfig) -> int:
    device = devices.device(config.device)
    davae = checkpoints.load_autoencoder(config.autoencoder, torch.float32).requires_grad_(False).to(device)
    about = {"autoencoder": records.fingerprint([config.autoencoder]), "dtype": config.dtype, "keys": KEYS}
    found = survey.collect(config.data, davae.latent.factor * MMDiTConfig.patch)
    logger.info("%s", found.table)
    done = encode_all(davae, found, config.out, about, config)
    logger.info("%d latents were added to %s", done, config.out)
    return done


def main(args: list[str] | None = None) -> int:
    """Compute latents from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    compute(tyro.cli(LatentsConfig, description=__doc__, args=args))
    return 0
