"""A program's memory and arithmetic without either: the program itself runs, on tensors that have shapes alone.

PyTorch's fake tensors go through every operation, its autograd and its autocast, and hold nothing. What is counted:

- bytes of all storages that are alive, at every operation, and the most there were at once (as the allocator of a GPU
  counts them, before it rounds them up);
- operations of products, convolutions and attention, forward and backward; a multiplication with its addition is two.

The fake device is a CPU, which every build of PyTorch has. In the operations that CUDA's autocast computes in fp32
and the CPU's does not, CUDA is followed. What a kernel takes for itself while it runs (workspaces of cuDNN and of
attention) is seen by nobody and has to be left free.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Computed in fp32 under CUDA's autocast (ATen/autocast_mode.h) and not under the CPU's, as far as they occur here.
CUDA_FP32 = (
    *("exp", "log", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor"),
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
)

aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts what happens while it is on.

    Attributes:
        live: bytes that are held now.
        peak: the most that were held at once since :meth:`restart`.
        flops: operations since then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.flops = 0, 0, 0
        self._sizes: dict[int, int] = {}
        self._elsewhere: set[int] = set()  # storages in the computer's memory, not in the device's
        self.off_device = False  # what is made now is in the computer's memory

    def restart(self) -> None:
        """Begin a new phase with what is held now."""
        self.peak, self.flops = self.live, 0

    def is_off_device(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in the computer's memory."""
        return tensor.untyped_storage()._cdata in self._elsewhere

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to make sure of it at every operation takes time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is aten._local_scalar_dense.default:  # no number is known; all are 1
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **kwargs)
        if (formula := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        off = self.off_device or (bool(self._elsewhere) and self._made_off_device(args, kwargs))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), off)
        return out

    def _made_off_device(self, *args: Any) -> bool:
        given = [tensor for tensor in tree_iter(args) if isinstance(tensor, torch.Tensor)]
        return bool(given) and all(self.is_off_device(tensor) for tensor in given)

    def _see(self, storage: torch.UntypedStorage, off: bool) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = 0 if off else storage.nbytes()
        if off:
            self._elsewhere.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        self._elsewhere.discard(key)


class _Transfers(TorchFunctionMode):
    """``tensor.cpu()`` leaves the device, and ``tensor.to(device)`` comes back."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            with off_device(self.counter):
                return args[0].clone()
        if func is torch.Tensor.to and self.counter.is_off_device(args[0]):
            target = args[1]
            if isinstance(target, (torch.device, torch.Tensor)):
                dtype = target.dtype if isinstance(target, torch.Tensor) else args[0].dtype
                return torch.empty(tuple(args[0].shape), dtype=dtype)
        return func(*args, **(kwargs or {}))


@contextmanager
def off_device(counter: Counter) -> Iterator[None]:
    """What is made inside is in the computer's memory."""
    counter.off_device = True
    try:
        yield
    finally:
        counter.off_device = False


@contextmanager
def counting(cuda: bool = True) -> Iterator[Counter]:
    """Inside, tensors are fake, and what they would need is counted.

    Args:
        cuda: autocast rounds where CUDA's does; otherwise where the CPU's does.
    """
    counter = Counter()
    with ExitStack() as stack:
        if cuda:
            stack.enter_context(_cuda_autocast())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counter)
        stack.enter_context(_Transfers(counter))
        yield counter


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """The CPU's autocast computes :data:`CUDA_FP32` in fp32."""
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        for name in CUDA_FP32:
            packet, _, overload = name.partition(".")
            library.impl(name, _in_fp32(getattr(getattr(aten, packet), overload or "default")), "AutocastCPU")
        yield


def _in_fp32(operation: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return operation(*map(_float, args), **{name: _float(value) for name, value in kwargs.items()})

    return call


def _float(value: Any) -> Any:
    low = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
