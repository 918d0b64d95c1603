"""Detail alignment, eq. 3-4."""

import pytest
import torch

from davae_core.alignment import alignment_loss, grouped_mean
from davae_core.errors import LatentError


def test_group_i_is_channels_ir_to_ir_plus_r() -> None:
    z_detail = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 30.0]).view(1, 6, 1, 1)
    assert grouped_mean(z_detail, 2).flatten().tolist() == [3.0, 20.0]
    assert grouped_mean(z_detail, 3).flatten().tolist() == [1.5, 8.0, 25.0]


def test_with_as_many_detail_as_base_channels_the_mean_changes_nothing() -> None:
    z_detail = torch.randn(2, 16, 3, 5)
    assert torch.equal(grouped_mean(z_detail, 16), z_detail)


def test_grouping_a_view_equals_grouping_its_copy() -> None:
    z_detail = torch.randn(1, 3, 5, 12).permute(0, 3, 1, 2)
    assert torch.equal(grouped_mean(z_detail, 4), grouped_mean(z_detail.contiguous(), 4))


def test_channels_that_do_not_group_are_refused_with_both_numbers() -> None:
    with pytest.raises(LatentError, match=r"24 detail channels .* 16 base channels"):
        grouped_mean(torch.zeros(1, 24, 2, 2), 16)


def test_loss_is_the_mean_square_of_the_difference() -> None:
    z_detail = torch.tensor([1.0, 3.0, 10.0, 20.0]).view(1, 4, 1, 1)  # grouped: 2, 15
    z_base = torch.tensor([5.0, 11.0]).view(1, 2, 1, 1)
    assert alignment_loss(z_detail, z_base).item() == (3**2 + 4**2) / 2


def test_loss_is_zero_where_the_groups_average_to_the_base() -> None:
    z_base = torch.randn(1, 4, 2, 2)
    offset = torch.tensor([-1.0, 0.0, 1.0]).repeat(4).view(1, 12, 1, 1)
    assert alignment_loss(z_base.repeat_interleave(3, dim=1) + offset, z_base) < 1e-12


def test_gradient_reaches_the_detail_latent_and_never_the_base_latent() -> None:
    z_detail = torch.randn(1, 8, 2, 2, requires_grad=True)
    z_base = torch.randn(1, 4, 2, 2, requires_grad=True)
    with torch.enable_grad():
        alignment_loss(z_detail, z_base).backward()
    assert z_base.grad is None
    error = grouped_mean(z_detail.detach(), 4) - z_base.detach()
    assert torch.allclose(z_detail.grad, (2 / 16 / 2 * error).repeat_interleave(2, dim=1))


@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (1, 16, 4, 1)])
def test_latents_of_different_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LatentError, match="not of one image"):
        alignment_loss(torch.zeros(1, 16, 4, 4), torch.zeros(shape))
