"""What processes of one run send to one another."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torch import nn

from davae_core.training.run import launch
from davae_core.training.run.task import Task
from davae_core.training.stages import STAGES


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_no_buffer_is_sent_at_a_step(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}

    class Known(Exception):
        """What was asked for is known."""

    def instead(**named: Any) -> None:
        options.update(named["kwargs_handlers"][0].to_kwargs())
        raise Known

    def no_task(recipe: Any, images: launch.Images) -> Task:
        raise AssertionError("the launcher is asked first")

    monkeypatch.setattr(launch, "Accelerator", instead)
    with pytest.raises(Known):
        launch.launch(STAGES["base_autoencoder"].recipes["micro"][1], 8, no_task)

    class Model(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("pos_embed", torch.zeros(9))

    # As it is without these options, a buffer is sent: the check can fail.
    wrapped = [nn.parallel.DistributedDataParallel(Model(), **given) for given in ({}, options)]
    assert [model.will_sync_module_buffers() for model in wrapped] == [True, False]
    assert options["gradient_as_bucket_view"]
