"""What a user has put on a MODEL, and what of it goes over to the adapted one: what is known to fit, and no more.

What stays behind is named in the log, and so is what was made for the unadapted model and may not fit.
"""

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...davae_core.adapter import WIDENED
from . import bypass
from .references import refers_to
from .weights import NETWORK

COMPILED = "torch.compile"  # the wrapper by which ComfyUI's compile nodes put a compiled network in place

# Attributes of a patcher that are numbers, names or switches; the last one is that of a loader for GGUF files.
_SETTINGS = ("weight_inplace_update", "force_cast_weights", "forced_hooks", "is_clip", "hook_mode", "patch_on_device")
# Attributes that are looked into below.
_PARTS = (
    "patches", "weight_wrapper_patches", "hook_patches", "object_patches", "model_options", "attachments",
    "additional_models", "callbacks", "wrappers", "injections",
)  # fmt: skip
# Attributes of one patcher around one inner model; the new one has its own.
_OWN = (
    "model", "size", "parent", "pinned", "backup", "backup_buffers", "object_patches_backup", "hook_backup",
    "hook_patches_backup", "cached_hook_patches", "current_hooks", "is_injected", "skip_injection", "patches_uuid",
    "clone_base_uuid", "is_multigpu_base_clone", "cached_patcher_init", "non_dynamic_delegate_model", "load_device",
    "offload_device", "mmap_released", "named_modules_to_munmap", "davae_adapted",
)  # fmt: skip

_OBJECTS = ("model_sampling", "manual_cast_dtype")  # object patches that do not depend on the network
_OPTIONS = {
    "transformer_options", "sampler_cfg_function", "sampler_post_cfg_function", "sampler_pre_cfg_function",
    "sampler_calc_cond_batch_function", "model_function_wrapper", "denoise_mask_function", "disable_cfg1_optimization",
    "context_handler",
}  # fmt: skip
_TRANSFORMER_OPTIONS = {
    "patches", "patches_replace", "wrappers", "callbacks", "optimized_attention_override", "rope_options", "easycache",
    "sample_sigmas",
}  # fmt: skip
_MULTIGPU = ("multigpu", "multigpu_options", "multigpu_clones", "multigpu_thread_pool")


def carry_over(base: ModelPatcher, patcher: ModelPatcher) -> None:
    """Put on ``patcher``, a fresh one around the adapted model, what the user has put on ``base``."""
    _Carrying(base, patcher).run()


class _Carrying:
    """One transfer; collects what the log is to name."""

    def __init__(self, base: ModelPatcher, patcher: ModelPatcher) -> None:
        self.base, self.patcher = base, patcher
        self.source = base.clone()  # its containers may be kept: they are not those of the user's patcher
        self.left: list[str] = []
        self.doubtful: list[str] = []

    def run(self) -> None:
        source, patcher = self.source, self.patcher
        for name in _SETTINGS:
            if hasattr(source, name):
                setattr(patcher, name, getattr(source, name))
        patcher.patches = self._weights("patch", source.patches, counted=True)
        patcher.weight_wrapper_patches = self._weights("weight wrapper", source.weight_wrapper_patches)
        patcher.hook_patches = {
            hook: self._weights("hook patch", patches) for hook, patches in source.hook_patches.items()
        }
        patcher.object_patches = self._only("object patch", source.object_patches, lambda name: name in _OBJECTS)
        patcher.attachments = source.attachments
        patcher.callbacks, patcher.wrappers = source.callbacks, source.wrappers
        patcher.additional_models = self._only("", source.additional_models, lambda name: name not in _MULTIGPU)
        patcher.model_options = self._options(source.model_options)
        bypass.carry(self.base, patcher, WIDENED)
        self._only("injection", source.injections, lambda name: name in patcher.injections)
        self._attributes()
        self._compiled()
        self._doubts()
        self._report()

    def _weights(self, kind: str, patches: dict[str, Any], counted: bool = False) -> dict[str, Any]:
        """Patches by weight, without those of layers that have another shape now; ``counted``: those are part of the
        new layers already."""
        widened = {NETWORK + name for name in WIDENED}
        known = self.patcher.model.state_dict().keys()
        kept = self._only(kind, patches, lambda key: key in known or key in widened)
        for key in widened & kept.keys():
            del kept[key]
            if not counted:
                self.left.append(f"{kind} {key}")
        return kept

    def _only(self, kind: str, parts: dict[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
        """The parts with wanted names; the log is to name the others."""
        self.left += [f"{kind} {name}".strip() for name in parts if not wanted(name) and parts[name]]
        return {name: value for name, value in parts.items() if wanted(name)}

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Model options: those that nobody knows here are kept, for a wrapper that is kept may read them."""
        options = self._only("option", options, lambda name: name not in _MULTIGPU)
        inner = options["transformer_options"] = dict(options.get("transformer_options", {}))
        cache = inner.get("easycache")  # EasyCache and LazyCache cut outputs to as many channels as the MODEL had
        if hasattr(cache, "output_channels"):
            inner["easycache"] = copy.copy(cache)
            inner["easycache"].output_channels = self.patcher.model.latent_format.latent_channels
        self.doubtful += [f"option {name}" for name in sorted(map(str, options.keys() - _OPTIONS))]
        self.doubtful += [
            f"transformer option {name}" for name in sorted(map(str, inner.keys() - _TRANSFORMER_OPTIONS))
        ]
        return options

    def _attributes(self) -> None:
        """Name what another pack or a newer ComfyUI has set on the patcher."""
        fresh = vars(self.patcher)
        for name, value in vars(self.source).items():
            ordinary = name in fresh and (fresh[name] is value or (not fresh[name] and not value))
            if name not in (*_SETTINGS, *_PARTS, *_OWN) and not ordinary:
                self.left.append(f"attribute {name}")

    def _compiled(self) -> None:
        if self.patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED):
            logging.warning("DA-VAE: the MODEL was compiled before the adapter; put the compile node after the adapter")
            self.patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILED)

    def _doubts(self) -> None:
        """Name the functions that hold on to the unadapted model; some versions copy what a clone holds."""
        base = self.base
        parts = {"attachments": base.attachments, "callbacks": base.callbacks, "wrappers": base.wrappers}
        for path, function in _leaves("", {**parts, **base.model_options}):
            if refers_to(function, base.model):
                about = getattr(function, "__qualname__", type(function).__name__)
                self.doubtful.append(f"{path.strip()} ({getattr(function, '__module__', '')}.{about})")

    def _report(self) -> None:
        if self.left:
            logging.warning(
                "DA-VAE: left out of the adapted MODEL, for it belongs to the unadapted one: %s. Put the node that "
                "makes it after the adapter",
                ", ".join(self.left),
            )
        if self.doubtful:
            logging.warning(
                "DA-VAE: may not fit the adapted MODEL, for it was made for the unadapted one or is not known here: "
                "%s. If the picture is wrong, put the node that makes it after the adapter",
                ", ".join(self.doubtful),
            )


def _leaves(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    """What nested dicts and lists hold, with its path."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(f"{path} {key}", part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(path, part)
    else:
        yield path, value
