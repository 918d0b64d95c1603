"""What is read from a file is kept in memory of its own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from davae_core.checkpoints import files, owned
from davae_core.checkpoints.header import DTYPES
from davae_core.errors import CheckpointError


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {name: torch.arange(-3, 3).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "F8_E8M0": torch.zeros(2, dtype=torch.uint16)}
    save_file(tensors, tmp_path / "all.safetensors", metadata={"a": "b"})
    found, metadata = files.read(tmp_path / "all.safetensors")
    assert metadata == {"a": "b"} and set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else found[name]


def test_a_file_that_is_overwritten_after_loading_changes_nothing(tmp_path: Path) -> None:
    path, tensor = tmp_path / "a.safetensors", torch.randn(1000)
    save_file({"a": tensor}, path)
    kept = files.read(path)[0]["a"]
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(len(data) - 4000)
        file.write(bytes(4000))
    assert torch.equal(kept, tensor)


@pytest.mark.parametrize("change", ["shorter", "other names", "other sizes", "no header", "nothing"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(1000)}, path)
    data = path.read_bytes()
    if change == "other names":
        save_file({"b": torch.randn(1000)}, path)
    elif change == "other sizes":
        save_file({"a": torch.randn(999)}, path)
    else:
        path.write_bytes({"shorter": data[:-1], "no header": b"\x09" + data[1:9] + b"x" * 99, "nothing": b""}[change])
    with pytest.raises(CheckpointError, match=r"a\.safetensors was changed while it was read"):
        owned.read(path, {"a": (torch.float32, (1000,))})
