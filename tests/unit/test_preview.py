"""Preview colours."""

from dataclasses import replace

import pytest
import torch

from davae_core.errors import DAVAEError
from davae_core.latent import LatentSpec
from davae_core.preview import fit_preview


def test_a_linear_map_from_latent_to_colour_is_found() -> None:
    factors, constant, z = torch.randn(16, 3), torch.randn(3), torch.randn(5, 16, 8, 8)
    image = torch.einsum("bchw,cr->brhw", z, factors) + constant.view(1, 3, 1, 1)
    found = torch.tensor(fit_preview(z, image)).view(17, 3)
    assert torch.allclose(found[:16], factors, atol=1e-5) and torch.allclose(found[16], constant, atol=1e-5)


def test_a_latent_takes_all_colours_or_none() -> None:
    assert replace(LatentSpec(), preview=(0.5,) * 51).preview == (0.5,) * 51
    with pytest.raises(DAVAEError, match="preview must hold 51 numbers or none, got 48"):
        LatentSpec(preview=(0.0,) * 48)
    with pytest.raises(DAVAEError, match="finite"):
        LatentSpec(preview=(float("nan"),) * 51)
