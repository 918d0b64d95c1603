"""Stage 2: an MMDiT with a wider embedder and head and LoRA.

In the formulas: T image tokens, L text tokens, h hidden, N blocks, d blocks with dual attention, r rank, B images at
once, e bytes of a number in the forward pass (4 in fp32, 2 in bf16).
"""

from dataclasses import dataclass, replace

import torch

from ...adapter import LORA_MODULES, PAPER_TARGETS, zero_adapter
from ...latent import LatentSpec
from ...mmdit import TIME_FREQUENCIES, MMDiT, MMDiTConfig
from .terms import Bytes, Flops

# Bytes that the backward pass of a block keeps, per image token and per text token and hidden feature. Counted on the
# block as it is written (every tensor that autograd saves), without and with autocast to bf16; dual: with attn2.
SAVED = {
    "fp32": {"plain": (92, 52), "dual": (124, 52), "last": (92, 24)},
    "bf16": {"plain": (60, 32), "dual": (86, 32), "last": (60, 16)},
}
TRAINED_BYTES = 4 + 4 + 8 + 4
TRAINED_FORMULA = "4 weight + 4 gradient + 8 moments + 4 average"


@dataclass(frozen=True)
class Stage2:
    """Shapes of an adapter training.

    Attributes:
        model: the pretrained model.
        latent: C and D.
        tokens: T, image tokens.
        text: L, text tokens.
        rank, targets: of the LoRA.
        bf16: the forward pass is in bf16, and so are frozen weights.
        recompute: gradient checkpointing of the blocks.
    """

    model: MMDiTConfig = MMDiTConfig()
    latent: LatentSpec = LatentSpec()
    tokens: int = 1024
    text: int = 333
    rank: int = 256
    targets: tuple[str, ...] = PAPER_TARGETS
    bf16: bool = True
    recompute: bool = True

    @property
    def layers(self) -> tuple[int, int, int]:
        """Of the LoRA: on image tokens, on text tokens, on the modulation."""
        weights = [LORA_MODULES[name][0] for name in self.targets if not name.startswith("attn2.")]
        modulation = sum("adaLN" in weight for weight in weights)
        text = sum(weight.startswith("context_block") for weight in weights)
        return len(weights) - text - modulation, text, modulation

    @property
    def precision(self) -> str:
        """Key of :data:`SAVED`."""
        return "bf16" if self.bf16 else "fp32"


def parameters(shape: Stage2) -> tuple[int, int, int]:
    """Frozen, trained, and numbers of the position grid; counted on the model itself without its memory."""
    wide = replace(shape.model, in_channels=shape.latent.channels, out_channels=shape.latent.channels)
    with torch.device("meta"):
        model = MMDiT(wide)
        lora = zero_adapter(shape.model, shape.latent, shape.rank, shape.targets).lora_state()
    widened = sum(p.numel() for part in (model.x_embedder, model.final_layer.linear) for p in part.parameters())
    factors = sum(tensor.numel() for name, tensor in lora.items() if not name.endswith(".alpha"))
    frozen = sum(p.numel() for p in model.parameters()) - widened
    return frozen, widened + factors, model.get_buffer("pos_embed").numel()


def flops(shape: Stage2) -> list[Flops]:
    """Of one image: the terms of a forward pass with LoRA beside the trunk, and what they cost in a training step."""
    m, t, n = shape.model, shape.tokens, shape.text
    h, depth, dual, patch = m.hidden, m.depth, len(m.dual_attention), m.patch**2
    image = 24.0 * h**2 * t * depth
    text = 24.0 * h**2 * n * (depth - 1) + 6.0 * h**2 * n
    joint = 4.0 * (t + n) ** 2 * h * (depth - 1) + 4.0 * t * (t + n) * h
    modulation = 2.0 * h**2 * (12 * depth - 4 + 3 * dual) + 4.0 * h**2
    embed = 2.0 * t * patch * shape.latent.channels * h
    small = 2.0 * n * m.context * h + 2.0 * (TIME_FREQUENCIES + m.pooled + 2 * h) * h
    lora = lora_flops(shape)
    again = 1.0 if shape.recompute else 0.0
    terms = [
        # name, formula, forward, backward / forward, computed again
        ("image tokens, linear", "24 h^2 T N", image, 1.0, again),
        # The text of the first block depends on nothing that is trained.
        ("text tokens, linear", "24 h^2 L (N - 1) + 6 h^2 L", text, 1.0 - 6.0 * h**2 * n / text, again),
        ("dual attention, linear", "8 h^2 T d", 8.0 * h**2 * t * dual, 1.0, again),
        ("joint attention", "4 (T + L)^2 h (N - 1) + 4 T (T + L) h", joint, 2.0, again),
        ("dual attention, products", "4 T^2 h d", 4.0 * t**2 * h * dual, 2.0, again),
        ("modulation", "2 h^2 (12 N - 4 + 3 d) + 4 h^2", modulation, 0.0, again * (1 - 4.0 * h**2 / modulation)),
        ("patch embedder, trained", "2 T p^2 (C + D) h", embed, 1.0, 0.0),
        ("head, trained", "2 T h p^2 (C + D)", embed, 2.0, 0.0),
        ("text, time and pooled embedders", "2 L context h + 2 (256 + pooled + 2 h) h", small, 0.0, 0.0),
        ("LoRA", "2 r (in + out) per token and layer", lora[0], lora[1] / lora[0] if lora[0] else 0.0, again),
    ]
    return [Flops(name, formula, f, b * f, a * f) for name, formula, f, b, a in terms]


def lora_flops(shape: Stage2) -> tuple[float, float]:
    """Forward and backward of the LoRA of one image: twice the forward, less where nothing before it is trained."""
    m, forward, backward = shape.model, 0.0, 0.0
    with torch.device("meta"):
        lora = zero_adapter(m, shape.latent, shape.rank, shape.targets).lora_state()
    for name, down in lora.items():
        if not name.endswith(".lora_A.weight"):
            continue
        block, module = name.split(".", 3)[2], name.split(".", 3)[3].removesuffix(".lora_A.weight")
        weight = LORA_MODULES[module][0]
        rank, inputs = down.shape
        outputs = lora[name.replace("lora_A", "lora_B")].shape[0]
        tokens = 1 if "adaLN" in weight else shape.text if weight.startswith("context_block") else shape.tokens
        forward += 2.0 * tokens * rank * (inputs + outputs)
        # The modulation reads time and pooled text; the first block's text attention reads text. Neither is trained.
        untrained = "adaLN" in weight or (block == "0" and weight == "context_block.attn.qkv")
        backward += 2.0 * tokens * rank * ((1 if untrained else 2) * inputs + 2 * outputs)
    return forward, backward


def memory(shape: Stage2, batch: int, gpus: int = 1, sharded: bool = False) -> list[Bytes]:
    """Of one process that takes ``batch`` images at once; the autoencoder that encodes them is not in it."""
    m, t, n = shape.model, shape.tokens, shape.text
    h, cut = m.hidden, gpus if sharded else 1
    e = 2 if shape.bf16 else 4
    frozen, trained, positions = parameters(shape)
    over = f" / {gpus} GPUs" if sharded else ""
    kept = saved(shape, batch)
    terms = [
        Bytes("frozen weights", f"{frozen:,} x {e}{over}", frozen * e / cut),
        Bytes("position grid", f"{positions:,} x {e}, in the file's dtype", positions * e),
        Bytes("trained", f"{trained:,} x ({TRAINED_FORMULA}){over}", trained * TRAINED_BYTES / cut),
    ]
    if shape.bf16:
        terms.append(Bytes("bf16 copies of trained weights", f"{trained:,} x 2", trained * 2.0, "training"))
    if sharded:
        block = 2 * (frozen * e + trained * 4) / m.depth
        terms.append(Bytes("two blocks gathered", "2 (frozen and trained weights) / N", block, "training"))
    if shape.recompute:
        inputs = 4.0 * batch * (t + n) * h * m.depth
        terms += [
            Bytes("inputs of the blocks", "4 B (T + L) h N", inputs, "training"),
            Bytes("one block, computed again", *max(kept, key=lambda entry: entry[1]), "training"),
        ]
    else:
        total = sum(count * times for (_, count), times in zip(kept, counts(shape), strict=True))
        terms.append(
            Bytes("inside all blocks", "; ".join(formula for formula, count in kept if count), total, "training")
        )
    passing = 8.0 * batch * t * h * e
    terms.append(Bytes("gradients on their way through an MLP", f"2 x 4 B T h e, e = {e}", passing, "training"))
    return terms


def counts(shape: Stage2) -> tuple[int, int, int]:
    """Blocks that are dual, plain, last."""
    dual = len([i for i in shape.model.dual_attention if i < shape.model.depth - 1])
    return dual, shape.model.depth - 1 - dual, 1


def saved(shape: Stage2, batch: int) -> list[tuple[str, float]]:
    """What a dual, a plain and the last block keep for the backward pass: formula, bytes (0 of a kind not there)."""
    h, t, n = shape.model.hidden, shape.tokens, shape.text
    e = 2 if shape.bf16 else 4
    image, text, _ = shape.layers
    out = []
    for kind, times in zip(("dual", "plain", "last"), counts(shape), strict=True):
        per_image, per_text = SAVED[shape.precision][kind]
        low = e * shape.rank * (image * t + text * n)
        formula = f"B (({per_image} T + {per_text} L) h + {e} r ({image} T + {text} L))"
        out.append((formula, float(batch * ((per_image * t + per_text * n) * h + low)) if times else 0.0))
    return out
