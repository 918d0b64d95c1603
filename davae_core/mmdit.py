"""MMDiT-X of Stable Diffusion 3 / 3.5 in the layout of its checkpoints, so loading is ``load_state_dict``.

Sources: SD3 (arXiv 2403.03206) and the tensor names and shapes of the SD3.5 files. Heads are 64 wide. Blocks that carry
``x_block.attn2`` ("dual attention", SD3.5-medium) attend once more among the image tokens alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .errors import CheckpointError, DAVAEError, LatentError
from .shapes import dims, number_at, numbered

HEAD_DIM = 64
TIME_FREQUENCIES = 256
MOST_BLOCKS = 128  # of a file; SD3.5-large has 38


@dataclass(frozen=True)
class MMDiTConfig:
    """Shape of an MMDiT; the defaults are SD3.5-medium.

    Attributes:
        hidden: width, a multiple of 64 (one head per 64).
        depth: joint blocks. In every published file hidden = 64 * depth.
        in_channels: latent channels read.
        out_channels: latent channels predicted.
        patch: latent pixels per token and direction.
        grid: side P of the stored position grid; a latent may have at most P * patch pixels a side.
        context: width of the text tokens.
        pooled: width of the pooled text vector.
        dual_attention: blocks with ``attn2``.
        qk_norm: queries and keys are RMS-normalised (SD3.5) or not (SD3).
    """

    hidden: int = 1536
    depth: int = 24
    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2
    grid: int = 384
    context: int = 4096
    pooled: int = 2048
    dual_attention: tuple[int, ...] = tuple(range(13))
    qk_norm: bool = True

    def __post_init__(self) -> None:
        if self.hidden % HEAD_DIM or self.hidden < HEAD_DIM:
            raise DAVAEError(f"hidden must be a multiple of {HEAD_DIM}, got {self.hidden}")
        if min(self.depth, self.in_channels, self.out_channels, self.patch, self.grid) < 1:
            raise DAVAEError(f"a model needs at least one block, channel and place in its position grid, got {self}")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden // HEAD_DIM

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> "MMDiTConfig":
        """Read the configuration off the shapes.

        Raises:
            CheckpointError: the names are not those of an SD3 / SD3.5 diffusion model.
        """
        try:
            blocks = {number_at(name, 1) for name in state if name.startswith("joint_blocks.")}
            depth = numbered(blocks, "joint blocks", MOST_BLOCKS)
            hidden, in_channels, patch, _ = dims(state, "x_embedder.proj.weight", 4)
            return cls(
                hidden=hidden,
                depth=depth,
                in_channels=in_channels,
                out_channels=dims(state, "final_layer.linear.weight", 2)[0] // patch**2,
                patch=patch,
                grid=math.isqrt(dims(state, "pos_embed", 3)[1]),
                context=dims(state, "context_embedder.weight", 2)[1],
                pooled=dims(state, "y_embedder.mlp.0.weight", 2)[1],
                dual_attention=tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in state),
                qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in state,
            )
        except CheckpointError as problem:
            raise CheckpointError(f"not an SD3 / SD3.5 diffusion model: {problem}") from problem


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """The projections of one attention; the attention itself is joint and happens in :class:`JointBlock`."""

    def __init__(self, hidden: int, qk_norm: bool, last: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.ln_q = nn.RMSNorm(HEAD_DIM, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(HEAD_DIM, eps=1e-6) if qk_norm else nn.Identity()
        if not last:
            self.proj = nn.Linear(hidden, hidden)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[B, L, hidden]`` to q, k, v of ``[B, heads, L, 64]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.ln_q(q), self.ln_k(k), v


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, read: torch.Tensor | None = None) -> torch.Tensor:
    """``[B, heads, L, 64]`` each to ``[B, L, hidden]``; ``read [B, 1, 1, L]`` tells which keys count."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=read).transpose(1, 2).flatten(2)


class Modulation(nn.Sequential):
    """SiLU and one linear layer: ``[B, hidden]`` to ``n`` vectors of ``[B, 1, hidden]``."""

    def __init__(self, hidden: int, n: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden, n * hidden))
        self.n = n

    def forward(self, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(c).unsqueeze(1).chunk(self.n, dim=-1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without parameters, then scale and shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class StreamBlock(nn.Module):
    """One stream (text or image) of a joint block: its modulation, projections and MLP."""

    def __init__(self, hidden: int, qk_norm: bool, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self.attn = Attention(hidden, qk_norm, last=last)
        if dual:
            self.attn2 = Attention(hidden, qk_norm)
        self.adaLN_modulation = Modulation(hidden, 2 if last else 9 if dual else 6)
        if not last:
            self.mlp = Mlp(hidden)

    def feed_forward(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """The MLP half of the block, with its residual."""
        return x + gate * self.mlp(modulate(x, shift, scale))


class JointBlock(nn.Module):
    """Text and image tokens attend to one another; each stream has its own weights."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.last = index == config.depth - 1
        self.dual = index in config.dual_attention
        self.context_block = StreamBlock(config.hidden, config.qk_norm, last=self.last)
        self.x_block = StreamBlock(config.hidden, config.qk_norm, dual=self.dual)

    def forward(
        self, context: torch.Tensor, x: torch.Tensor, c: torch.Tensor, read: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``context [B, L, hidden]``, ``x [B, T, hidden]``, ``c [B, hidden]``, ``read [B, 1, 1, L + T]`` or None.

        The last block leaves context alone.
        """
        text, image = self.context_block, self.x_block
        text_mod = text.adaLN_modulation(c)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *dual_mod = image.adaLN_modulation(c)

        text_q, text_k, text_v = text.attn.heads(modulate(context, text_mod[0], text_mod[1]))
        q, k, v = image.attn.heads(modulate(x, shift, scale))
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        length = context.shape[1]
        if self.last:  # nobody reads the text tokens any more
            image_out = attend(q, k, v, read)
        else:
            joint = attend(torch.cat([text_q, q], dim=2), k, v, read)
            image_out = joint[:, length:]
            context = context + text_mod[2] * text.attn.proj(joint[:, :length])
            context = text.feed_forward(context, *text_mod[3:])

        residual = gate * image.attn.proj(image_out)
        if self.dual:
            dual_shift, dual_scale, dual_gate = dual_mod
            alone = attend(*image.attn2.heads(modulate(x, dual_shift, dual_scale)))
            residual = residual + dual_gate * image.attn2.proj(alone)
        return context, image.feed_forward(x + residual, mlp_shift, mlp_scale, mlp_gate)


class PatchEmbed(nn.Module):
    """``[B, C, h, w]`` to tokens ``[B, h w / patch^2, hidden]``."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden, config.patch, stride=config.patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # or each layer that follows copies them


class Embedder(nn.Module):
    """Two linear layers with SiLU between, for the time and for the pooled text."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class FinalLayer(nn.Module):
    """Tokens to patches: ``[B, T, hidden]`` to ``[B, T, patch^2 * out]``, channels innermost."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(config.hidden, 2)
        self.linear = nn.Linear(config.hidden, config.patch**2 * config.out_channels)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(x, shift, scale))


class MMDiT(nn.Module):
    """The diffusion transformer of SD3 and SD3.5."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = Embedder(TIME_FREQUENCIES, config.hidden)
        self.y_embedder = Embedder(config.pooled, config.hidden)
        self.context_embedder = nn.Linear(config.context, config.hidden)
        self.register_buffer("pos_embed", torch.zeros(1, config.grid**2, config.hidden))
        self.joint_blocks = nn.ModuleList(JointBlock(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        present: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the velocity.

        Args:
            x: ``[B, in_channels, h, w]``, the noisy latent in the model's units.
            t: ``[B]``, noise level in [0, 1].
            context: ``[B, L, context]``, text tokens.
            pooled: ``[B, pooled]``.
            present: ``[B, L]``, bool; text tokens that are there, where prompts of a batch differ in length. None: all.

        Returns:
            ``[B, out_channels, h, w]``.

        Raises:
            LatentError: ``x`` has the wrong channels or is larger than the position grid.
        """
        height, width = x.shape[-2:]
        x = self._pad(x)
        rows, columns = (side // self.config.patch for side in x.shape[-2:])
        tokens = self.x_embedder(x) + self._positions(rows, columns).to(x.dtype)
        c = self.t_embedder(time_features(t).to(x.dtype)) + self.y_embedder(pooled)
        context = self.context_embedder(context)
        read = None if present is None else F.pad(present, (0, tokens.shape[1]), value=True)[:, None, None]
        for block in self.joint_blocks:
            context, tokens = block(context, tokens, c, read)
        patches = self.final_layer(tokens, c)
        return self._unpatchify(patches, rows, columns)[..., :height, :width]

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """Wrap around on the right and the bottom to whole patches, as the reference implementations do."""
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise LatentError(f"latent has shape {list(x.shape)}, expected [batch, {self.config.in_channels}, h, w]")
        bottom, right = (-side % self.config.patch for side in x.shape[-2:])
        return F.pad(x, (0, right, 0, bottom), mode="circular") if bottom or right else x

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        """The centre ``rows x columns`` of the position grid, ``[1, rows * columns, hidden]``."""
        grid = self.config.grid
        if max(rows, columns) > grid:
            most = grid * self.config.patch
            raise LatentError(
                f"latent of {rows * self.config.patch} x {columns * self.config.patch} pixels is larger than the "
                f"model's position grid allows ({most} x {most}); make a smaller image"
            )
        top, left = (grid - rows) // 2, (grid - columns) // 2
        square = self.get_buffer("pos_embed").view(1, grid, grid, -1)
        return square[:, top : top + rows, left : left + columns].flatten(1, 2)

    def _unpatchify(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """``[B, rows * columns, patch^2 * out]`` to ``[B, out, h, w]``."""
        p = self.config.patch
        patches = patches.unflatten(-1, (p, p, -1)).unflatten(1, (rows, columns))  # [B, rows, columns, p, p, out]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def time_features(t: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of 1000 t, ``[B]`` to ``[B, 256]``, in float32."""
    half = TIME_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_grid(side: int, hidden: int, unit: float = 1.0) -> torch.Tensor:
    """Fixed sine-cosine positions ``[1, side^2, hidden]`` for a new model.

    The first half of the features tells columns, the second rows, in steps of ``unit``.
    """
    positions = torch.arange(side, dtype=torch.float64) * unit
    frequencies = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angles = positions[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, hidden / 2]
    columns = axis[None].expand(side, -1, -1)
    rows = axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, hidden).float()
