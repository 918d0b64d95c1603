"""A custom-node pack for the server soak alone: it looks into the server's memory and lets calls run out of it.

GET  /soak/memory   {"rss": bytes, "tensors": bytes}, after a collection
GET  /soak/calls    how many calls of torch's layers there were since the last POST
POST /soak/oom      {"at": n, "error": "cuda"}: the n-th call from now on ends with that error; n = 0 for none
"""

# ruff: noqa: D102  ComfyUI prescribes the methods

import contextlib
import ctypes
import gc
import hashlib
import itertools

import psutil
import torch
from aiohttp import web
from server import PromptServer

ERRORS = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)"),
    "mps": lambda: RuntimeError("MPS backend out of memory (injected)"),
    "cpu": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory (injected)"),
}
CALLS = ("conv2d", "linear", "group_norm", "layer_norm", "silu", "scaled_dot_product_attention")
_runs = itertools.count()


class Saboteur:
    """Counts calls of ``torch.nn.functional`` and lets one of them fail."""

    def __init__(self) -> None:
        self.count, self.at, self.error = 0, 0, "cuda"
        for name in CALLS:
            setattr(torch.nn.functional, name, self._counted(getattr(torch.nn.functional, name)))

    def arm(self, at: int, error: str) -> None:
        self.count, self.at, self.error = 0, at, error

    def _counted(self, function):
        def call(*arguments, **named):
            self.count += 1
            if self.count == self.at:
                raise ERRORS[self.error]()
            return function(*arguments, **named)

        return call


SABOTEUR = Saboteur()


class _NeverCached:
    CATEGORY = "harness"
    FUNCTION = "execute"

    @classmethod
    def IS_CHANGED(cls, **_) -> int:
        return next(_runs)


class AnyType(str):
    """The wildcard type."""

    def __ne__(self, other: object) -> bool:
        return False


class SoakFresh(_NeverCached):
    """Hands on what it gets, but never out of the cache: everything behind it runs again."""

    RETURN_TYPES = (AnyType("*"),)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": (AnyType("*"), {"forceInput": True})}}

    def execute(self, value: object) -> tuple[object]:
        return (value,)


class SoakFingerprint(_NeverCached):
    """Sends a hash of the weights of a MODEL, a VAE or a DAVAE to the client; a LoRA that is in use does not count."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": (AnyType("*"), {"forceInput": True})}}

    def execute(self, value) -> dict:
        if hasattr(value, "first_stage_model"):
            state = value.first_stage_model.state_dict()
        else:
            state = dict(value.model.state_dict())
            for key, saved in getattr(value, "backup", {}).items():
                state[key] = saved[0]
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(name.encode())
            digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return {"ui": {"text": [digest.hexdigest()]}}


@PromptServer.instance.routes.get("/soak/memory")
async def _memory(_):
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back to the system
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return web.json_response({"rss": psutil.Process().memory_info().rss, "tensors": sum(storages.values())})


@PromptServer.instance.routes.get("/soak/calls")
async def _calls(_):
    return web.json_response({"calls": SABOTEUR.count})


@PromptServer.instance.routes.post("/soak/oom")
async def _oom(request):
    told = await request.json()
    SABOTEUR.arm(told["at"], told.get("error", "cuda"))
    return web.json_response({})


NODE_CLASS_MAPPINGS = {"SoakFresh": SoakFresh, "SoakFingerprint": SoakFingerprint}
