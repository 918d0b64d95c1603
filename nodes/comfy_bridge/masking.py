"""Sampling the detail channels alone: a denoise mask that is 0 on the base channels.

The noise mask of a LATENT cannot tell channels apart: ComfyUI repeats it over all of them. What a MODEL's denoise mask
function makes of it at each step can.
"""

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...davae_core.errors import DAVAEError
from .model import require_adapted

MASK_FUNCTION = "denoise_mask_function"  # its name among a MODEL's options
MaskFunction = Callable[..., torch.Tensor]


def keep_base(model: ModelPatcher) -> ModelPatcher:
    """A clone of an adapted MODEL that samples detail channels only, where the noise mask of the LATENT is white.

    A denoise mask function that is on the MODEL, or is put on the clone later, still decides about the detail.

    Raises:
        DAVAEError: the MODEL is not adapted; in the sampler: the LATENT has no noise mask.
    """
    base = require_adapted(model.model).davae_latent.base_channels

    def sample(
        executor: Any,
        noise: torch.Tensor,
        image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        mask: torch.Tensor | None = None,
        *rest: Any,
        **named: Any,
    ) -> torch.Tensor:
        """Around the guider's ``outer_sample``: what the function cannot see to."""
        if mask is None:
            raise DAVAEError(
                "the MODEL is to sample detail only, but the LATENT has no noise mask, so all of it would be sampled. "
                "Connect the LATENT output of Re-roll Detail to the sampler, beside its MODEL output"
            )
        # Read now: some samplers (uni_pc) write into the sigmas they are given.
        to_the_end, kept = bool(sigmas[-1] == 0), image[:, :base].clone()
        options = executor.class_obj.model_options
        options[MASK_FUNCTION] = detail_only(base, options.get(MASK_FUNCTION))  # may be another node's by now
        out = executor(noise, image, sampler, sigmas, mask, *rest, **named)
        if to_the_end:  # then no rounding, and no noise that some samplers leave
            out[:, :base] = kept
        return out

    clone = model.clone()
    clone.set_model_denoise_mask_function(detail_only(base, model.model_options.get(MASK_FUNCTION)))
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "davae_keep_base", sample)
    return clone


def detail_only(base_channels: int, before: MaskFunction | None) -> MaskFunction:
    """A denoise mask function that does what ``before`` does, then masks the base channels out."""

    def function(sigma: torch.Tensor, denoise_mask: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        mask = before(sigma, denoise_mask, extra_options=extra_options) if before else denoise_mask
        mask = mask.expand(denoise_mask.shape).clone()  # [B, C + D, h, w]
        mask[:, :base_channels] = 0
        return mask

    return function
