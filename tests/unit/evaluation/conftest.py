"""A tiny family with random weights, on disk and loaded: 64 px images, 32 px base images, 4 tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints, tiny
from davae_core.adapter import Recommended
from davae_core.autoencoder import AutoencoderConfig
from davae_core.checkpoints import files
from davae_core.evaluation.family import FILES, Family, load_family
from davae_core.evaluation.references import References, load_references
from davae_core.mmdit import MMDiTConfig
from davae_core.text_encoder import TextEncoder, TextEncoderConfig
from harness.untrained import Family as Untrained

UNTRAINED = Untrained(
    base=AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1),
    model=MMDiTConfig(hidden=64, depth=2, grid=8, context=32, pooled=16, dual_attention=(0,)),
    recommended=Recommended(size=64, shift=2.0, cfg=2.0, steps=2),
)


@pytest.fixture(scope="session")
def untrained() -> Untrained:
    return UNTRAINED


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files in the sub-folders that the pack has."""
    where = tmp_path_factory.mktemp("family")
    torch.manual_seed(5)
    model = UNTRAINED.model
    text = TextEncoder(TextEncoderConfig(UNTRAINED.words, context=model.context, pooled=model.pooled))
    for kind in FILES.values():
        (where / kind).mkdir()
    files.save(where / "diffusion_models" / tiny.MODEL, UNTRAINED.diffusion_model().state_dict(), {})
    checkpoints.save_text_encoder(where / "text_encoders" / tiny.TEXT_ENCODER, text)
    checkpoints.save_autoencoder(where / "vae" / tiny.AUTOENCODER, UNTRAINED.davae())
    checkpoints.save_adapter(where / "loras" / tiny.ADAPTER, UNTRAINED.adapter())
    return where


@pytest.fixture(scope="session")
def family(folder: Path) -> Family:
    return load_family(folder)


@pytest.fixture(scope="session")
def references() -> References:
    """Those that ship."""
    return load_references()


@pytest.fixture
def few() -> Callable[..., References]:
    """``few(captions, held_out)``: references of random pictures, 8 px."""

    def make(captions: tuple[str, ...], held_out: tuple[str, ...] = ()) -> References:
        generator = torch.Generator().manual_seed(3)
        images = torch.rand(len(captions), 3, 8, 8, generator=generator) * 2 - 1
        return References(images, captions, torch.tensor([caption in held_out for caption in captions]))

    return make
