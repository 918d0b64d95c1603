"""Whether a function that some node has put on a MODEL holds on to that MODEL."""

import functools
import types
from collections.abc import Iterable
from typing import Any

import comfy.model_base
import torch
from comfy.model_patcher import ModelPatcher

_DEPTH = 5  # closures of closures, and objects in them
_PLAIN = (torch.Tensor, str, bytes, int, float, bool, type, types.ModuleType, type(None))


def refers_to(value: Any, model: comfy.model_base.BaseModel) -> bool:
    """Whether ``value`` reaches the inner model, its network or a patcher around it by closures or attributes.

    Such a function may have been written for the number of channels or the layers that this model has. One that
    looks at its arguments alone has not.
    """
    return _reaches(value, model, {id(part) for part in model.modules()}, set(), _DEPTH)


def _reaches(value: Any, model: comfy.model_base.BaseModel, modules: set[int], seen: set[int], depth: int) -> bool:
    if isinstance(value, _PLAIN) or id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, ModelPatcher):
        return value.model is model
    if isinstance(value, torch.nn.Module):
        return id(value) in modules and not isinstance(value, type(model.model_sampling))
    return depth > 0 and any(_reaches(part, model, modules, seen, depth - 1) for part in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    """What a value holds."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        cells = map(_content, value.__closure__ or ())
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return list(getattr(value, "__dict__", {}).values())


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
