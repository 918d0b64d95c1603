"""Toy models with random weights, small enough that every claim can be checked on the real thing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from davae_core.autoencoder import AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig, sincos_grid

State = Mapping[str, torch.Tensor]
TOY_VAE = AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1)
TOY_MMDIT = MMDiTConfig(hidden=128, depth=2, grid=16, context=48, pooled=40, dual_attention=(0,))


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """The same random numbers in each test, and no autograd where a test does not ask for it."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture
def toy_vae() -> AutoencoderConfig:
    return TOY_VAE


@pytest.fixture
def toy_mmdit() -> MMDiTConfig:
    return TOY_MMDIT


@pytest.fixture(scope="session")
def make_davae() -> Callable[..., DAVAE]:
    """``make_davae(detail=16, scale=2, base=..., shared_trunk=True, base_decoder=False, **latent)``."""

    def make(
        detail: int = 16,
        scale: int = 2,
        base: AutoencoderConfig = TOY_VAE,
        shared_trunk: bool = True,
        base_decoder: bool = False,
        **latent: object,
    ) -> DAVAE:
        spec = LatentSpec(base.latent_channels, detail, scale, base.factor, **latent)  # type: ignore[arg-type]
        model = DAVAE(DAVAEConfig(base, spec, shared_trunk, base_decoder)).eval()
        for block in (model.detail_down, model.joint_up):
            if block.shortcut is not None:  # starts at zero, where it would hide what it does
                torch.nn.init.normal_(block.shortcut.weight, std=0.02)
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):  # 1 and 0 would hide a mix-up of channels
                torch.nn.init.normal_(module.weight, 1.0, 0.2)
                torch.nn.init.normal_(module.bias, 0.0, 0.2)
        return model

    return make


@pytest.fixture
def davae(make_davae: Callable[..., DAVAE]) -> DAVAE:
    """C = D = 16, s = 2, one trunk."""
    return make_davae()


@pytest.fixture(scope="session")
def make_mmdit() -> Callable[..., MMDiT]:
    """``make_mmdit(**changes of TOY_MMDIT)``."""

    def make(**changes: object) -> MMDiT:
        config = replace(TOY_MMDIT, **changes)  # type: ignore[arg-type]
        model = MMDiT(config).eval()
        model.pos_embed.copy_(sincos_grid(config.grid, config.hidden))
        return model

    return make


@pytest.fixture
def mmdit(make_mmdit: Callable[..., MMDiT]) -> MMDiT:
    return make_mmdit()


@pytest.fixture
def run_state() -> Callable[..., torch.Tensor]:
    """``run_state(state, x)``: the prediction of the MMDiT with these tensors, always at the same time and text."""

    def run(state: State, x: torch.Tensor) -> torch.Tensor:
        config = MMDiTConfig.from_state_dict(state)
        with torch.device("meta"):
            model = MMDiT(config)
        model.load_state_dict(dict(state), assign=True)
        generator = torch.Generator().manual_seed(7)
        batch = x.shape[0]
        t = torch.rand(batch, generator=generator)
        context = torch.randn(batch, 5, config.context, generator=generator)
        pooled = torch.randn(batch, config.pooled, generator=generator)
        return model(x, t, context, pooled)

    return run


@pytest.fixture
def picture() -> Callable[..., torch.Tensor]:
    """``picture(height, width=height, batch=1)`` in [-1, 1]: flat, gradient, noise and stripes, a quarter each."""

    def make(height: int, width: int | None = None, batch: int = 1) -> torch.Tensor:
        width = width or height
        x = torch.full((batch, 3, height, width), -0.9)
        x[:, :, : height // 2, width // 2 :] = torch.linspace(-1, 1, width - width // 2)
        x[:, :, height // 2 :, : width // 2] = torch.rand(batch, 3, height - height // 2, width // 2) * 2 - 1
        x[:, :, height // 2 :: 2, width // 2 :] = 1.0
        return x

    return make


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it have held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
        given = {
            StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := StorageWeakRef(tensor.untyped_storage())) not in given:
                self.live[storage] = tensor.untyped_storage().nbytes()
        self.bytes = max(self.bytes, sum(self.live.values()))
        return out


@pytest.fixture
def peak() -> Callable[[Callable[[], object]], int]:
    """``peak(call)``: the most bytes that tensors made by the call hold at a time, whatever device they are on."""

    def count(call: Callable[[], object]) -> int:
        with Peak() as tracked:
            call()
        return tracked.bytes

    return count
