"""A tiny family with random weights, on disk and loaded: 64 px images, 32 px base images, 4 tokens."""

from collections.abc import Callable

import pytest
import torch

from davae_core import checkpoints
from davae_core.adapter import Recommended
from davae_core.autoencoder import AutoencoderConfig
from davae_core.checkpoints import files
from davae_core.evaluation.family import Family, FamilyFiles, load_family
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
def where(tmp_path_factory: pytest.TempPathFactory) -> FamilyFiles:
    """The four files, under names and in places of their own."""
    root = tmp_path_factory.mktemp("family")
    (root / "deep").mkdir()
    where = FamilyFiles(root / "m.safetensors", root / "deep" / "v.safetensors", root / "a.safetensors", root / "t.sft")
    torch.manual_seed(5)
    model = UNTRAINED.model
    text = TextEncoder(TextEncoderConfig(UNTRAINED.words, context=model.context, pooled=model.pooled))
    files.save(where.model, UNTRAINED.diffusion_model().state_dict(), {})
    checkpoints.save_text_encoder(root / "t.sft", text)
    checkpoints.save_autoencoder(where.autoencoder, UNTRAINED.davae())
    checkpoints.save_adapter(where.adapter, UNTRAINED.adapter())
    return where


@pytest.fixture(scope="session")
def options(where: FamilyFiles) -> list[str]:
    """The family as a command line names it."""
    told = {"--model": where.model, "--autoencoder": where.autoencoder, "--adapter": where.adapter}
    told["--text-encoder"] = where.text_encoder or where.model
    return [word for option, path in told.items() for word in (option, str(path))]


@pytest.fixture(scope="session")
def family(where: FamilyFiles) -> Family:
    return load_family(where)


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
