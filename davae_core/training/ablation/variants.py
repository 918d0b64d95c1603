"""What is compared: each variant differs from its group's control by a few settings of one stage.

Groups start from the same files and have the same budget:

    adapter   an adapter from zero, on the DA-VAE that is given
    latent    a new detail branch before the given DA-VAE's decoder, both trained; then an adapter from zero on it
    decoder   the given DA-VAE's decoder trained on, and decoding what the given adapter draws
    sampling  no training: the given family, sampled in another way
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import DAVAEError

Changes = Mapping[str, Any]
ABOUT = {
    "adapter": "stage 2 from zero on the given DA-VAE",
    "latent": "stage 1 with a new detail branch, from the given decoder; then stage 2 from zero on it",
    "decoder": "the decoder alone, trained on; the given adapter draws",
    "sampling": "the given family as it is",
}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        group: key of :data:`ABOUT`.
        name: unique in its group; the first of a group is its control.
        about: what it is, for people.
        autoencoder, adapter: settings of the stage's recipe by dotted name.
        sampling: fields of :class:`~davae_core.sampling.Sampling`.
        residual: with the given predictor inside the given DA-VAE.
    """

    group: str
    name: str
    about: str
    autoencoder: Changes = field(default_factory=dict)
    adapter: Changes = field(default_factory=dict)
    sampling: Changes = field(default_factory=dict)
    residual: bool = False

    @property
    def key(self) -> str:
        """``group/name``."""
        return f"{self.group}/{self.name}"


def _adapter(name: str, about: str, **changes: Any) -> Variant:
    return Variant("adapter", name, about, adapter=_dotted(changes))


def _residual(name: str, about: str, **changes: Any) -> Variant:
    return Variant("adapter", name, about, adapter=_dotted(changes), residual=True)


def _latent(name: str, about: str, **changes: Any) -> Variant:
    return Variant("latent", name, about, autoencoder=_dotted(changes))


def _decoder(level: float, **changes: Any) -> Variant:
    name = f"noise-{level:g}"
    return Variant("decoder", name, f"latents noised by 0 to {level:g}", autoencoder={"latent_noise": level, **changes})


def _sampling(name: str, about: str, **changes: Any) -> Variant:
    return Variant("sampling", name, about, sampling=changes)


def _dotted(changes: Changes) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in changes.items()}


EVERYTHING = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear",
)  # fmt: skip

AT_ONCE: Changes = {"zero_init": False, "detail_warmup": 0}

VARIANTS: tuple[Variant, ...] = (
    _adapter("paper", "zero-initialised, detail weight rising over a third of the steps, LoRA of the recipe's rank"),
    _adapter("no-zero-init", "new columns and rows drawn as wide as the pretrained ones", zero_init=False),
    _adapter("no-schedule", "detail weight 1 from the first step", detail_warmup=0),
    _adapter("at-once", "both of these: the detail from the first step on", **AT_ONCE),
    _adapter("at-once-every-layer", "the same, LoRA on every layer that can have one", **AT_ONCE, targets=EVERYTHING),
    _adapter(
        "at-once-fast", "the same, and twice the learning rate", **AT_ONCE, targets=EVERYTHING, optimiser__lr=1.2e-3
    ),
    _residual("residual", "the latent holds what a predictor does not expect of the detail"),
    _residual("residual-no-schedule", "the same, detail weight 1 from the first step", detail_warmup=0),
    _residual("residual-at-once", "the same, new columns and rows drawn as wide as the pretrained ones", **AT_ONCE),
    _adapter("base-ahead", "the detail's spread times 2: its times are shifted by 2", detail_factor=2.0),
    _adapter("base-ahead-no-schedule", "both of these", detail_factor=2.0, detail_warmup=0),
    _adapter("detail-ahead", "the detail's spread times 0.5", detail_factor=0.5),
    _adapter("rank-8", "LoRA of rank 8", rank=8),
    _adapter("rank-32", "LoRA of rank 32", rank=32),
    _adapter("rank-256", "LoRA of rank 256, the model's width", rank=256),
    _adapter("no-lora", "embedder and head alone", rank=0),
    _adapter("norms", "LoRA on the modulation alone", targets=("norm1.linear",)),
    _adapter("every-layer", "LoRA on every layer that can have one", targets=EVERYTHING),
    _adapter("min-snr", "min-SNR weights with gamma 5, as in the release", flow__min_snr=5.0),
    _adapter("shift-1", "times not shifted", flow__shift=1.0),
    _adapter("shift-4", "times shifted by 4", flow__shift=4.0),
    _latent("paper", "alignment 0.2, D = 16, the base encoder's trunk, detail dropout 0.1"),
    _latent("no-alignment", "lambda 0", alignment__weight=0.0),
    _latent("lambda-0.1", "lambda 0.1", alignment__weight=0.1),
    _latent("lambda-0.5", "lambda 0.5", alignment__weight=0.5),
    _latent("lambda-1", "lambda 1", alignment__weight=1.0),
    _latent("d-32", "32 detail channels", detail_channels=32),
    _latent("d-48", "48 detail channels", detail_channels=48),
    _latent("own-trunk", "a trunk of its own for the detail", train_trunk=True),
    _latent("no-dropout", "no detail dropout", detail_dropout=0.0),
    _latent("more-kl", "KL times 100", losses__kl=1e-5),
    _latent("noise-0.5", "latents noised by 0 to 0.5 from the start", latent_noise=0.5),
    _decoder(0.0),
    _decoder(0.25),
    _decoder(0.5),
    _decoder(1.0),
    _sampling("recommended", "as the adapter's file says"),
    _sampling("cfg-1", "no guidance", cfg=1.0),
    _sampling("cfg-1.5", "guidance 1.5", cfg=1.5),
    _sampling("cfg-2", "guidance 2", cfg=2.0),
    _sampling("cfg-3", "guidance 3", cfg=3.0),
    _sampling("cfg-3-detail-1.5", "guidance 3 for the base, 1.5 for the detail", cfg=3.0, detail_cfg=1.5),
    _sampling("cfg-1.5-detail-1", "guidance 1.5 for the base, none for the detail", cfg=1.5, detail_cfg=1.0),
    _sampling("shift-1", "times not shifted", shift=1.0),
    _sampling("shift-4", "times shifted by 4", shift=4.0),
    _sampling("steps-100", "100 steps", steps=100),
)


def chosen(names: Sequence[str], variants: Sequence[Variant] = VARIANTS) -> list[Variant]:
    """Variants by ``group/name`` or whole groups, each with its group's control; all where nothing is named.

    Raises:
        DAVAEError: there is none of that name.
    """
    known = {variant.key for variant in variants} | {variant.group for variant in variants}
    for name in names:
        if name not in known:
            raise DAVAEError(f"there is no variant {name!r}; choose among {', '.join(sorted(known))}")
    some = [v for v in variants if not names or v.key in names or v.group in names]
    groups = {variant.group for variant in some}
    return [v for v in variants if v in some or (v.group in groups and v == control(v.group, variants))]


def control(group: str, variants: Sequence[Variant] = VARIANTS) -> Variant:
    """What the others of a group are compared with."""
    return next(variant for variant in variants if variant.group == group)
