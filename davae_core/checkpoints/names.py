"""What the tensors of a layout are called in another, as rules that can be followed in both directions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .tensors import Tensors


@dataclass(frozen=True)
class Rule:
    """One tensor of the native layout, and what becomes of it in the other.

    Attributes:
        native: its name here.
        theirs: its name there; several where it is split by rows (a fused projection).
        swapped: its two halves (shift and scale) are in the other order there.
        linear: a 1x1 convolution ``[out, in, 1, 1]`` here is a linear layer ``[out, in]`` there.
    """

    native: str
    theirs: tuple[str, ...]
    swapped: bool = False
    linear: bool = False

    def to_native(self, theirs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The native tensor."""
        parts = [theirs[name] for name in self.theirs]
        for part in parts[1:]:
            torch.promote_types(parts[0].dtype, part.dtype)  # of 8 bits beside others raises, on the meta device too
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor[:, :, None, None] if self.linear else tensor

    def from_native(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The tensor that is called ``name`` in the other layout."""
        if self.linear:
            tensor = tensor.flatten(1)
        if self.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor.chunk(len(self.theirs))[self.theirs.index(name)]


def to_native(theirs: Tensors, rules: Iterable[Rule], file: str) -> Tensors:
    """Tensors of another layout under native names.

    Raises:
        CheckpointError: a tensor that the rules need is not there, or one is there that no rule takes.
    """
    by_name = {rule.native: rule for rule in rules}
    needed = {name for rule in by_name.values() for name in rule.theirs}
    lacking, left = sorted(needed - set(theirs)), sorted(set(theirs) - needed)
    if lacking:
        raise CheckpointError(f"{file} lacks {len(lacking)} tensors of its layout, {lacking[0]} first; it is damaged")
    if left:
        raise CheckpointError(
            f"{file} holds {len(left)} tensors that its layout does not have, {left[0]} first; it is another model"
        )
    try:
        meta = {name: rule.to_native(theirs.meta) for name, rule in by_name.items()}
    except (RuntimeError, IndexError) as problem:
        raise CheckpointError(f"{file} holds tensors of wrong shapes or dtypes ({problem}); it is damaged") from problem
    return Tensors(meta, lambda name: by_name[name].to_native(theirs))


def from_native(native: Tensors, rules: Iterable[Rule]) -> Tensors:
    """Native tensors under the names of another layout.

    Raises:
        CheckpointError: a tensor that the rules need is not there.
    """
    home = {name: rule for rule in rules for name in rule.theirs}
    if lacking := sorted({rule.native for rule in home.values()} - set(native.meta)):
        raise CheckpointError(f"{len(lacking)} tensors of its layout are not there, {lacking[0]} first; it is damaged")
    meta = {name: rule.from_native(native.meta[rule.native], name) for name, rule in home.items()}
    return Tensors(meta, lambda name: home[name].from_native(native[home[name].native], name))
