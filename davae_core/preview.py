"""Colours for previews: what each base channel adds to a pixel."""

import torch


def fit_preview(z_base: torch.Tensor, image: torch.Tensor) -> tuple[float, ...]:
    """The linear map from a latent pixel to its colour with the least squared error.

    Args:
        z_base: ``[B, C, h, w]`` in the diffusion model's units.
        image: ``[B, 3, h, w]`` in [-1, 1], the images that were encoded, averaged over each latent pixel.

    Returns:
        C + 1 times red, green, blue: for each channel, then the constant.
    """
    z = z_base.movedim(1, -1).flatten(0, -2).double()
    colours = image.movedim(1, -1).flatten(0, -2).double()
    ones = z.new_ones(len(z), 1)
    return tuple(torch.linalg.lstsq(torch.cat([z, ones], dim=1), colours).solution.flatten().tolist())
