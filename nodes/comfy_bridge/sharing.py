"""The trunk in memory: an adapted model and its base hold the same tensors while neither is on a GPU.

What comes back from a GPU is a copy. So when the adapted model is unloaded, its trunk is tied to the base's again.
"""

import weakref
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from .weights import NETWORK, saved_weights, tensor_of_its_own

_KEY = "davae_shared_trunk"


def keep(patcher: ModelPatcher, base: ModelPatcher, without: tuple[str, ...]) -> None:
    """Share the trunk of an adapted MODEL with its base anew whenever the adapted one is unloaded.

    Args:
        patcher: the adapted MODEL.
        base: the MODEL it was made from; only read, and not kept alive by this.
        without: names of the weights in the network that the two do not share.
    """
    ours, theirs = weakref.ref(patcher.model), weakref.ref(base)
    own = {NETWORK + name for name in without}

    def unloaded(which: ModelPatcher, unpatched: bool) -> None:
        source = theirs()
        if unpatched and source is not None and which.model is ours():  # and not a deep copy
            with torch.inference_mode():  # outside of it, what was loaded in it would be copied
                _tie(which, source, own)

    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _KEY, unloaded)


def _tie(patcher: ModelPatcher, base: ModelPatcher, own: set[str]) -> None:
    saved, weights = saved_weights(base), dict(base.model.named_parameters())
    for key, weight in list(patcher.model.named_parameters()):
        source = saved.get(key, weights.get(key))
        if source is not None and key.startswith(NETWORK) and key not in own and _is_copy(weight, source):
            comfy.utils.set_attr_param(patcher.model, key, tensor_of_its_own(source))


def _is_copy(a: Any, b: Any) -> bool:
    """Whether two tensors are equal and in different places of the same device's memory."""
    if (type(a.data), a.dtype, a.shape, a.device) != (type(b.data), b.dtype, b.shape, b.device):
        return False
    return a.data_ptr() != b.data_ptr() and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
