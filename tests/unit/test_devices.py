"""The device that a setting names, and what is said where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae_core import devices
from davae_core.errors import DAVAEError
from davae_core.training import residual
from davae_core.training.data import stored_latents
from davae_core.training.text import encode


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:", ""])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(DAVAEError, match=f"cannot compute on the device '{name}'.*--device cpu"):
        devices.device(name)


def test_a_device_that_is_there() -> None:
    assert devices.device("cpu") == torch.device("cpu")
    assert devices.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "residual": residual.main,
    "latents": stored_latents.main,
    "text": encode.main,
}
NEEDED = {
    "residual": ["--predictor", "no", "--autoencoder", "no", "--data.images", "no"],
    "latents": ["--autoencoder", "no", "--data.images", "no"],
    "text": ["--images", "no"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_training_command_says_so_before_it_reads_anything(command: str, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match="cannot compute on the device 'abacus'"):
        COMMANDS[command]([*NEEDED[command], "--out", str(tmp_path / "out"), "--device", "abacus"])
    assert not list(tmp_path.iterdir())
