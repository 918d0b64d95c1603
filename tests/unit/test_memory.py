"""The memory that ComfyUI is asked for is what encoding and decoding take, counted at the SD3 VAE's full width.

Counted on the meta device, which has no fused attention: the worst case, and no memory of this machine is taken.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from davae_core import attention
from davae_core.attention import ATTENTION_SCORES
from davae_core.autoencoder import AttnBlock, AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.memory import decode_bytes, encode_bytes

Peak = Callable[[Callable[[], object]], int]
SD3 = AutoencoderConfig()
SMALL = AutoencoderConfig((32, 64, 128, 128), 2)
MOST = 1.25  # times what is counted


@pytest.fixture(autouse=True)
def scores_in_full_precision() -> Iterator[None]:
    """As PyTorch has it by itself; ComfyUI lets attention without a kernel stay in half precision, which takes less."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def counted(peak: Peak, config: AutoencoderConfig, what: str, dtype: torch.dtype, size: int, rows: int | None) -> int:
    with torch.device("meta"):
        model = DAVAE(DAVAEConfig(config)).to(dtype).eval()
        x = torch.empty(1, 3, size, size, dtype=dtype)
        z = torch.empty(1, 32, size // 16, size // 16, dtype=dtype)
    if what == "encode":
        return peak(lambda: model.encode(x) if rows is None else model.encode_tiled(x, rows=rows))
    return peak(lambda: model.decode(z) if rows is None else model.decode_tiled(z, rows=rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["encode", "decode"])
@pytest.mark.parametrize(
    ("config", "size", "rows"),
    [(SD3, 512, None), (SD3, 2048, None), (SD3, 512, 64), (SD3, 256, 16), (SMALL, 512, None), (SMALL, 256, 64)],
)
def test_the_estimate_is_what_is_counted_or_a_quarter_more(
    peak: Peak, what: str, dtype: torch.dtype, config: AutoencoderConfig, size: int, rows: int | None
) -> None:
    estimate = (encode_bytes if what == "encode" else decode_bytes)(config, size, size, dtype.itemsize, rows)
    assert 1 <= estimate / counted(peak, config, what, dtype, size, rows) <= MOST


def test_a_2048_px_image_decodes_in_6_gb_whole_and_2_5_gb_in_strips() -> None:
    assert decode_bytes(SD3, 2048, 2048, 2) <= 6.2e9
    assert decode_bytes(SD3, 2048, 2048, 2, 64) <= 2.5e9
    assert decode_bytes(SD3, 2048, 2048, 2, 16) <= 2.1e9


def test_attention_without_a_fused_kernel_takes_no_memory_for_all_pairs_of_pixels(peak: Peak) -> None:
    with torch.device("meta"):
        block, x = AttnBlock(512), torch.empty(1, 512, 256, 256)  # the middle block at 2048 px
    assert peak(lambda: block(x)) <= 10 * x.numel() * 4 + 2 * ATTENTION_SCORES * 4


@pytest.mark.parametrize("tokens", [64, 65, 300])
def test_attention_in_parts_is_the_attention(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 1, tokens, 32)
    expected = F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(attention, "ATTENTION_SCORES", 64 * 64)
    with sdpa_kernel(SDPBackend.MATH):
        assert (attention.attention(q, k, v) - expected).abs().max() <= 1e-5
    assert torch.equal(attention.attention(q, k, v), expected)  # a fused kernel gets all queries at once


@pytest.mark.parametrize("rows", [16, 40])
def test_the_base_vae_in_strips_is_the_base_vae(make_davae: Callable[..., DAVAE], rows: int) -> None:
    model = make_davae(base_decoder=True)
    x, z = torch.rand(1, 3, 96, 64) * 2 - 1, torch.randn(1, 16, 12, 8)
    assert (model.encode_small_tiled(x, rows) - model.encode_small(x)).abs().max() <= 1e-5
    assert (model.decode_base_tiled(z, rows) - model.decode_base(z)).abs().max() <= 1e-5
