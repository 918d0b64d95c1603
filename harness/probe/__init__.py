"""Test-only nodes that carry Python objects in and out of a graph, so that a test can look at any link of it.

Linked into the scratch base directory under `comfyui-harness-probe`. The runner reaches `STORE` through the module that
ComfyUI loaded (`sys.modules[HarnessCapture.__module__]`), never by importing this package a second time. V1 nodes,
because ComfyUI 0.3.x accepts the wildcard type only from a `str` that is never unequal.
"""

# ruff: noqa: D102  ComfyUI prescribes the methods

import itertools


class AnyType(str):
    """The wildcard type: equal to every other type name in ComfyUI's link validation."""

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")
_run = itertools.count()


class Store:
    """What goes in (`inputs`) and what came out (`captured`) of the current run."""

    def __init__(self) -> None:
        self.inputs: dict[str, object] = {}
        self.captured: dict[str, object] = {}


STORE = Store()


class _NeverCached:
    CATEGORY = "harness"
    FUNCTION = "execute"

    @classmethod
    def IS_CHANGED(cls, **_) -> int:
        return next(_run)


class HarnessCapture(_NeverCached):
    """Keeps `value` under `key`; the runner hands it out as `result.captured[key]`."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": (ANY, {"forceInput": True}), "key": ("STRING", {"default": "value"})}}

    def execute(self, value: object, key: str) -> dict:
        STORE.captured[key] = value
        return {}


class HarnessConstant(_NeverCached):
    """Puts the object given to the runner as `inputs[key]` into the graph."""

    RETURN_TYPES = (ANY,)
    RETURN_NAMES = ("value",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"key": ("STRING", {"default": "value"})}}

    def execute(self, key: str) -> tuple[object]:
        if key not in STORE.inputs:
            raise KeyError(
                f"HarnessConstant wants the input {key!r}; comfy.run(..., inputs=...) gave {sorted(STORE.inputs)}"
            )
        return (STORE.inputs[key],)


class HarnessConditioning:
    """A random CONDITIONING of the widths a toy SD3 model wants, so that sampling needs no text encoder."""

    CATEGORY = "harness"
    FUNCTION = "execute"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        widths = {"context": ("INT", {"default": 64}), "pooled": ("INT", {"default": 32})}
        return {"required": {**widths, "seed": ("INT", {"default": 0})}}

    def execute(self, context: int, pooled: int, seed: int) -> tuple[list]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(1, 8, context, generator=generator)
        return ([[tokens, {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


NODE_CLASS_MAPPINGS = {
    "HarnessCapture": HarnessCapture,
    "HarnessConstant": HarnessConstant,
    "HarnessConditioning": HarnessConditioning,
}
