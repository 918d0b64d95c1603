"""The picture of the model card: what the shipped family draws, training captions and then held-out pairs.

python -m davae_core.training.tiny.samples
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ... import command, images, tiny
from ...evaluation import generate
from ...evaluation.family import load_family
from ...evaluation.generate import Prompt
from ...evaluation.references import PICTURE, load_references

SHEET = Path(tiny.__file__).with_name("samples.jpg")


@dataclass(frozen=True)
class SamplesConfig:
    """How many, and where to."""

    training: int = 80
    """Captions that were trained on, evenly spread."""
    held_out: int = 48
    """Pairs that were not."""
    columns: int = 16
    """Pictures in a row."""
    seed: int = 0
    """Noise seed."""
    out: Path = SHEET
    """JPEG file to write."""


@torch.no_grad()
def samples(config: SamplesConfig) -> torch.Tensor:
    """Pictures ``[N, 3, H, W]`` in [-1, 1], sampled as the adapter recommends."""
    family, references = load_family(), load_references(PICTURE)
    some = [
        indices[i * len(indices) // count]
        for indices, count in ((references.training, config.training), (references.held_out_indices, config.held_out))
        for i in range(count)
    ]
    prompts = [Prompt(index, references.captions[index]) for index in some]
    how = generate.adapted_sampling(family)
    drawn = [generate.adapted_images(family, part, config.seed, how) for part in generate.batches(prompts, 32)]
    return torch.cat(drawn)


def main(args: list[str] | None = None) -> int:
    """Draw from the command line."""
    config = tyro.cli(SamplesConfig, description=__doc__, args=args)
    sheet = images.mosaic(samples(config), config.columns)
    images.save_image(config.out, sheet)
    return 0


if __name__ == "__main__":
    command.run(main)
