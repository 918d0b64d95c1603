"""A second, plain forward pass on tensors in diffusers' names: what a converted file is checked against.

It shares no code with the models of this package, so that a name or an order that was mixed up shows as a difference.
All in float32; a tensor is read when its turn comes. Sources: the forward passes of diffusers' ``AutoencoderKL`` and
``JointTransformerBlock``.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

Weights = Mapping[str, torch.Tensor]


def _get(w: Weights, name: str) -> torch.Tensor:
    return w[name].float()


def _linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ _get(w, f"{name}.weight").T + _get(w, f"{name}.bias")


def _conv(w: Weights, name: str, x: torch.Tensor, stride: int = 1, padding: int = 1) -> torch.Tensor:
    return F.conv2d(x, _get(w, f"{name}.weight"), _get(w, f"{name}.bias"), stride, padding)


def _norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, 32, _get(w, f"{name}.weight"), _get(w, f"{name}.bias"), eps=1e-6)


# AutoencoderKL


def _resnet(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    h = _conv(w, f"{name}.conv1", F.silu(_norm(w, f"{name}.norm1", x)))
    h = _conv(w, f"{name}.conv2", F.silu(_norm(w, f"{name}.norm2", h)))
    shortcut = f"{name}.conv_shortcut"
    return h + (_conv(w, shortcut, x, padding=0) if f"{shortcut}.weight" in w else x)


def _resnets(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    i = 0
    while f"{name}.resnets.{i}.conv1.weight" in w:
        x = _resnet(w, f"{name}.resnets.{i}", x)
        i += 1
    return x


def _middle(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    x = _resnet(w, f"{name}.resnets.0", x)
    at = f"{name}.attentions.0"
    tokens = _norm(w, f"{at}.group_norm", x).flatten(2).transpose(1, 2)  # [B, h w, c]
    q, k, v = (_linear(w, f"{at}.to_{part}", tokens) for part in "qkv")
    weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
    mixed = _linear(w, f"{at}.to_out.0", weights @ v)
    return _resnet(w, f"{name}.resnets.1", x + mixed.transpose(1, 2).reshape(x.shape))


def encoder_features(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """``[B, 3, H, W]`` in [-1, 1] to what ``encoder.conv_out`` reads, ``[B, width, H/f, W/f]``."""
    h = _conv(w, "encoder.conv_in", x)
    i = 0
    while f"encoder.down_blocks.{i}.resnets.0.conv1.weight" in w:
        h = _resnets(w, f"encoder.down_blocks.{i}", h)
        down = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        if f"{down}.weight" in w:
            h = _conv(w, down, F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        i += 1
    return F.silu(_norm(w, "encoder.conv_norm_out", _middle(w, "encoder.mid_block", h)))


def encode(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """``[B, 3, H, W]`` in [-1, 1] to the mean latent ``[B, C, H/f, W/f]``."""
    moments = _conv(w, "encoder.conv_out", encoder_features(w, x))
    if "quant_conv.weight" in w:
        moments = F.conv2d(moments, _get(w, "quant_conv.weight"), _get(w, "quant_conv.bias"))
    return moments.chunk(2, dim=1)[0]


def decode_features(w: Weights, h: torch.Tensor) -> torch.Tensor:
    """What ``decoder.conv_in`` gives, ``[B, width, h, w]``, to an image ``[B, 3, f h, f w]``."""
    h = _middle(w, "decoder.mid_block", h)
    i = 0
    while f"decoder.up_blocks.{i}.resnets.0.conv1.weight" in w:
        h = _resnets(w, f"decoder.up_blocks.{i}", h)
        up = f"decoder.up_blocks.{i}.upsamplers.0.conv"
        if f"{up}.weight" in w:
            h = _conv(w, up, h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        i += 1
    return _conv(w, "decoder.conv_out", F.silu(_norm(w, "decoder.conv_norm_out", h)))


def decode(w: Weights, z: torch.Tensor) -> torch.Tensor:
    """Latent ``[B, C, h, w]`` to an image ``[B, 3, f h, f w]``."""
    if "post_quant_conv.weight" in w:
        z = F.conv2d(z, _get(w, "post_quant_conv.weight"), _get(w, "post_quant_conv.bias"))
    return decode_features(w, _conv(w, "decoder.conv_in", z))


# SD3Transformer2DModel


def _rms(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    if f"{name}.weight" not in w:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * _get(w, f"{name}.weight")


def _standardised(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, 64)).transpose(1, 2)  # [B, heads, L, 64]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v).transpose(1, 2).flatten(2)


def _projected(
    w: Weights, at: str, names: tuple[str, str, str], norms: tuple[str, str], x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    q, k, v = (_heads(_linear(w, f"{at}.{name}", x)) for name in names)
    return _rms(w, f"{at}.{norms[0]}", q), _rms(w, f"{at}.{norms[1]}", k), v


_IMAGE = (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
_TEXT = (("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))


def embed(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """``[B, in, h, w]`` to tokens with their positions, ``[B, h w / patch^2, hidden]``."""
    patch = w["pos_embed.proj.weight"].shape[-1]
    tokens = _conv(w, "pos_embed.proj", x, stride=patch, padding=0)
    rows, columns = tokens.shape[-2:]
    side = round(w["pos_embed.pos_embed"].shape[1] ** 0.5)
    top, left = (side - rows) // 2, (side - columns) // 2
    grid = w["pos_embed.pos_embed"].reshape(side, side, -1)[top : top + rows, left : left + columns]
    return tokens.flatten(2).transpose(1, 2) + grid.reshape(1, rows * columns, -1).float()


def condition(w: Weights, t: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Noise level ``[B]`` in [0, 1] and pooled text ``[B, pooled]`` to ``[B, hidden]``."""
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = 1000 * t.double()[:, None] * frequencies
    at = "time_text_embed"
    time = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    time = _linear(w, f"{at}.timestep_embedder.linear_2", F.silu(_linear(w, f"{at}.timestep_embedder.linear_1", time)))
    text = F.silu(_linear(w, f"{at}.text_embedder.linear_1", pooled))
    return time + _linear(w, f"{at}.text_embedder.linear_2", text)


def context_tokens(w: Weights, context: torch.Tensor) -> torch.Tensor:
    """Text tokens ``[B, L, context]`` to ``[B, L, hidden]``."""
    return _linear(w, "context_embedder", context)


def block(
    w: Weights, i: int, context: torch.Tensor, x: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Joint block ``i``: text ``[B, L, hidden]`` and image ``[B, T, hidden]``; the last block gives no text."""
    at = f"transformer_blocks.{i}"
    c = F.silu(c)
    mod = _linear(w, f"{at}.norm1.linear", c)[:, None].split(x.shape[-1], dim=-1)
    text_mod = _linear(w, f"{at}.norm1_context.linear", c)[:, None].split(x.shape[-1], dim=-1)
    last = len(text_mod) == 2  # scale, shift
    text_scale, text_shift = text_mod if last else (text_mod[1], text_mod[0])

    normal, text_normal = _standardised(x), _standardised(context)
    q, k, v = _projected(w, f"{at}.attn", *_IMAGE, normal * (1 + mod[1]) + mod[0])
    parts = _projected(w, f"{at}.attn", *_TEXT, text_normal * (1 + text_scale) + text_shift)
    joint = _attend(*(torch.cat(pair, dim=2) for pair in zip((q, k, v), parts, strict=True)))
    image_out, text_out = joint[:, : x.shape[1]], joint[:, x.shape[1] :]

    x = x + mod[2] * _linear(w, f"{at}.attn.to_out.0", image_out)
    if len(mod) == 9:
        alone = _attend(*_projected(w, f"{at}.attn2", *_IMAGE, normal * (1 + mod[7]) + mod[6]))
        x = x + mod[8] * _linear(w, f"{at}.attn2.to_out.0", alone)
    x = x + mod[5] * _mlp(w, f"{at}.ff", _standardised(x) * (1 + mod[4]) + mod[3])
    if last:
        return None, x
    context = context + text_mod[2] * _linear(w, f"{at}.attn.to_add_out", text_out)
    fed = _mlp(w, f"{at}.ff_context", _standardised(context) * (1 + text_mod[4]) + text_mod[3])
    return context + text_mod[5] * fed, x


def _mlp(w: Weights, at: str, x: torch.Tensor) -> torch.Tensor:
    return _linear(w, f"{at}.net.2", F.gelu(_linear(w, f"{at}.net.0.proj", x), approximate="tanh"))


def head(w: Weights, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Tokens ``[B, T, hidden]`` to patches ``[B, T, patch^2 out]``, channels innermost."""
    scale, shift = _linear(w, "norm_out.linear", F.silu(c))[:, None].chunk(2, dim=-1)
    return _linear(w, "proj_out", _standardised(x) * (1 + scale) + shift)


def image_of(patches: torch.Tensor, rows: int, columns: int, patch: int) -> torch.Tensor:
    """Patches ``[B, rows * columns, patch^2 out]``, channels innermost, to ``[B, out, patch rows, patch columns]``."""
    out = torch.zeros(patches.shape[0], patches.shape[-1] // patch**2, patch * rows, patch * columns)
    channels = out.shape[1]
    for y in range(patch):
        for x in range(patch):
            place = patches[..., (y * patch + x) * channels : (y * patch + x + 1) * channels]
            out[:, :, y::patch, x::patch] = place.transpose(1, 2).reshape(-1, channels, rows, columns)
    return out


def transformer(
    w: Weights, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """The prediction ``[B, out, h, w]``; arguments as :meth:`davae_core.mmdit.MMDiT.forward`, whole patches only."""
    patch = w["pos_embed.proj.weight"].shape[-1]
    rows, columns = (side // patch for side in x.shape[-2:])
    text: torch.Tensor | None = context_tokens(w, context)
    tokens, c = embed(w, x), condition(w, t, pooled)
    i = 0
    while text is not None:
        text, tokens = block(w, i, text, tokens, c)
        i += 1
    return image_of(head(w, tokens, c), rows, columns, patch)
