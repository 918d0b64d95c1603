"""Frozen autoencoders in pieces: the same results, less memory, and errors that say what to do."""

from collections.abc import Callable

import pytest
import torch

from davae_core.autoencoder import AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.errors import DAVAEError
from davae_core.training.planning.counter import counting
from davae_core.training.planning.skeletons import empty
from davae_core.training.run.on_device import OnDevice
from davae_core.training.run.task import Batch
from davae_core.training.tasks import pieces

CONFIG = DAVAEConfig(AutoencoderConfig(widths=(32, 64, 64, 64), blocks=1), base_decoder=True)
WORK: dict[str, Callable[[DAVAE, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "encode": lambda davae, x, z: pieces.encode(davae, x),
    "encode_base": lambda davae, x, z: pieces.encode_base(davae, x),
    "features": lambda davae, x, z: pieces.features(davae.base_encoder, CONFIG.base, x),
    "decode": lambda davae, x, z: pieces.decode(davae, z, 0.5),
}


@pytest.fixture(scope="module")
def davae() -> DAVAE:
    torch.manual_seed(0)
    return DAVAE(CONFIG).requires_grad_(False)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("numbers", [2 * 64 * 64**2, 64], ids=["two at a time", "strips"])
@torch.no_grad()
def test_pieces_give_the_same_to_rounding(
    davae: DAVAE, work: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, z = torch.rand(3, 3, 64, 64) * 2 - 1, torch.randn(3, 32, 4, 4)
    whole = WORK[work](davae, x, z)
    monkeypatch.setattr(pieces, "LARGEST", numbers)
    monkeypatch.setattr(pieces, "STRIP_ROWS", 16)
    torch.testing.assert_close(WORK[work](davae, x, z), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_many_images_take_the_memory_of_few_and_a_large_one_less_than_whole() -> None:
    peaks = {}
    with counting() as memory:
        davae = empty(lambda: DAVAE(DAVAEConfig()))
        for count, side in ((4, 1024), (8, 1024), (1, 3072)):
            x = torch.zeros(count, 3, side, side)
            memory.restart()
            held = memory.live
            pieces.encode(davae, x)
            peaks[count, side] = memory.peak - held
    assert peaks[8, 1024] == pytest.approx(peaks[4, 1024], rel=0.01)
    whole = peaks[4, 1024] * 9 / 4
    assert peaks[1, 3072] < 0.55 * whole


def test_not_enough_memory_is_an_error_that_says_what_to_do() -> None:
    with (
        pytest.raises(DAVAEError, match=r"not enough memory to draw .*: draw less"),
        pieces.out_of_memory("to draw", "draw less"),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), pieces.out_of_memory("to draw", "draw less"):
        torch.zeros(2).view(3)


def test_a_step_brings_one_micro_batch_to_the_device_at_a_time() -> None:
    batches: list[Batch] = [{"image": torch.zeros(2, 3, 8, 8), "caption": [str(i)]} for i in range(3)]
    step = OnDevice(batches, torch.device("meta"))
    assert len(step) == 3 and all(batch["image"].device.type == "cpu" for batch in batches)
    assert [(batch["image"].device.type, batch["caption"]) for batch in step] == [("meta", [str(i)]) for i in range(3)]
    assert step[0]["image"] is not step[0]["image"]
