"""FSDP on two processes without a GPU, launched with the configuration that is part of the pack."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from davae_core.checkpoints import files
from davae_core.training.run import state

CONFIGS = Path(__file__).parents[3] / "davae_core" / "training" / "configs"
OPTIONS = [
    "--flow.min-snr",
    "5",
    "--flow.prompt-dropout",
    "0.3",
    "--gradient-checkpointing",
    "--optimiser.schedule",
    "constant",
]
# As in test_processes: small steps keep rounding apart from mistakes.
CALM = ["--optimiser.lr", "1e-4", "--run.precision", "fp32"]
STEPS = 20
DRIVER = """
import json, sys

from davae_core.errors import DAVAEError
from davae_core.training import stages

for command in json.loads(sys.argv[1]):
    assert stages.run("adapter", command) == 0
try:
    stages.run("autoencoder", json.loads(sys.argv[2]))
except DAVAEError as problem:
    print(problem, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def sharded(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An adapter of 20 steps, in micro-batches of one; another that goes on after 12; what the processes said."""
    out = tmp_path_factory.mktemp("sharded")
    options = [*CALM, *OPTIONS, "--run.micro-batch", "1"]
    commands = [
        stages.command("adapter", out / "whole", STEPS, *options),
        stages.command("adapter", out / "parts", 12, *options),
        stages.command("adapter", out / "parts", STEPS, *options, "--run.resume"),
        stages.command("adapter", out / "bf16", 2, *options, "--frozen", "bf16", "--run.precision", "bf16"),
    ]
    driver = out / "driver.py"
    driver.write_text(DRIVER)
    vae = stages.command("autoencoder", out / "vae", 1)
    ended = launch(str(driver), json.dumps(commands), json.dumps(vae))
    assert ended.returncode == 0, ended.stderr
    return out, ended.stderr


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """On two processes, with the committed configuration but for the number of GPUs, of which there are none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--config_file {CONFIGS / 'fsdp_8x80.yaml'} --num_processes 2 --main_process_port {port}"
    root = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *command],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process."""
    out = tmp_path_factory.mktemp("alone")
    with torch.enable_grad():
        assert stages.run("adapter", out, STEPS, *CALM, *OPTIONS) == 0
    return out


def test_sharded_processes_give_the_losses_of_one(stages: Any, sharded: tuple[Path, str], alone: Path) -> None:
    cut, one = stages.curves(sharded[0] / "whole"), stages.curves(alone)
    assert {"adapter/loss", "adapter/gradient"} < cut.keys() == one.keys()
    for name, points in one.items():
        assert set(points) == set(range(1, STEPS + 1))
        assert [cut[name][step] for step in points] == pytest.approx(list(points.values()), rel=1e-3), name


def test_the_file_at_the_end_is_one_and_that_of_one_process(
    stages: Any, sharded: tuple[Path, str], alone: Path
) -> None:
    for name in stages.exports["adapter"]:
        (tensors, info), (expected, told) = (files.read(folder / name) for folder in (sharded[0] / "whole", alone))
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}
        assert info["davae.config"] == told["davae.config"]
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[key], atol=2e-4, rtol=0)
        moved = [n for n, t in tensors.items() if "lora_B" in n and t.abs().max() > 5e-4]
        assert moved, "20 steps of 1e-4 change nothing, so any file would pass"


def test_a_resumed_sharded_run_is_the_unbroken_one(stages: Any, sharded: tuple[Path, str]) -> None:
    whole, parts = (stages.weights(sharded[0] / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_one_process_goes_on_with_the_state_of_two(stages: Any, sharded: tuple[Path, str]) -> None:
    time.sleep(1.1)  # TensorBoard orders its files by the second
    assert stages.run("adapter", sharded[0] / "whole", STEPS + 1, *CALM, *OPTIONS, "--run.resume") == 0
    assert state.load(sharded[0] / "whole").step == STEPS + 1


def test_frozen_weights_in_bf16_share_blocks_with_trained_ones_in_fp32(stages: Any, sharded: tuple[Path, str]) -> None:
    half, full = (stages.curves(sharded[0] / name)["adapter/loss"] for name in ("bf16", "whole"))
    assert half[2] == pytest.approx(full[2], rel=0.03)
    assert {tensor.dtype for tensor in stages.weights(sharded[0] / "bf16").values()} == {torch.float32}


def test_what_has_nothing_to_shard_says_which_configuration_to_use(sharded: tuple[Path, str]) -> None:
    assert "cannot be trained with FSDP" in sharded[1] and "ddp_*.yaml" in sharded[1]


def test_the_optimiser_has_moments_of_the_trained_parameters_alone(stages: Any) -> None:
    held = stages.weights(stages.folder("adapter"))
    trained = {name.split("/", 2)[2] for name in held if name.startswith("adapter/weight/")}
    moments = {name.split("/", 2)[2].rpartition("/")[0] for name in held if name.startswith("adapter/moment/")}
    assert moments == trained
    assert all(".down." in name or ".up." in name or "x_embedder" in name or "final_layer" in name for name in trained)
    assert sum(".down." in name for name in trained) == 2 * 6  # of two blocks


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_what_its_name_says(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    kind, *numbers = path.stem.replace("_", "x").split("x")
    gpus, machines = int(numbers[-2]), int(numbers[0]) if len(numbers) == 3 else 1
    assert config["num_machines"] == machines
    assert config["num_processes"] == gpus * machines
    several = {"ddp": "MULTI_GPU", "fsdp": "FSDP"}[kind]
    assert config["distributed_type"] == (several if gpus > 1 else "NO")
    assert config["mixed_precision"] == "no"
