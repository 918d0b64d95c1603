"""The recipes of the tiny family: two sizes of one recipe, thirteen trainings each.

``micro`` makes 128 px images from 16 tokens, ``tiny`` 256 px images from 64. The base models work at half these sizes.
"""

from dataclasses import replace

from ... import tiny
from ...adapter import PAPER_TARGETS, Recommended
from ...autoencoder import AutoencoderConfig
from ...mmdit import MMDiTConfig
from ..data.config import DataConfig
from ..objective import ReconstructionConfig
from ..places import SIZES, folder
from ..run.config import OptimiserConfig, RunConfig
from ..tasks import adapter, autoencoder, base_autoencoder, base_dit, few_steps, predictor, tiny_decoder
from ..tasks.redrawing import RedrawConfig

# 64 at least: with 32, each of the 32 norm groups is one channel, and colours get lost.
BASE = AutoencoderConfig(widths=(64, 64, 64, 64), blocks=1)
MODEL = MMDiTConfig(hidden=256, depth=4, grid=32, context=256, pooled=256, dual_attention=(0, 1))
FLOW = base_dit.FlowConfig(shift=2.0)


def _images(size: str, *parts: str) -> tuple[str, ...]:
    return tuple(str(folder(size, "data") / part) for part in parts)


def base_autoencoder_recipe(size: str) -> base_autoencoder.BaseAutoencoderRecipe:
    """The base VAE, on all images but the held-out ones."""
    return base_autoencoder.BaseAutoencoderRecipe(
        data=DataConfig(_images(size, "train", "other"), size=SIZES[size] // 2, workers=0, cache=True),
        run=RunConfig(folder(size, "base_autoencoder"), steps=3000, batch=8),
        optimiser=OptimiserConfig(lr=1e-3, schedule="cosine", ema=0.995),
        losses=ReconstructionConfig(l1=1.0, l2=2.0, perceptual=0.0, kl=5e-7),
        model=BASE,
    )


def base_dit_recipe(size: str) -> base_dit.BaseDiTRecipe:
    """The base model and its text encoder.

    The other names are seen in every style, which is how a style comes to mean something apart from the names; the
    captions to be learned well are seen nine times as often.
    """
    return base_dit.BaseDiTRecipe(
        data=DataConfig(
            _images(size, "train::repeats=9", "other"), size=SIZES[size] // 2, flip=False, workers=0, cache=True
        ),
        run=RunConfig(folder(size, "base_dit"), steps=8000, batch=64),
        autoencoder=folder(size, "base_autoencoder") / tiny.BASE_AUTOENCODER,
        optimiser=OptimiserConfig(lr=6e-4, schedule="cosine", ema=0.999, weight_decay=0.01),
        flow=FLOW,
        model=MODEL,
        keep_latents=True,
    )


def autoencoder_recipe(size: str) -> autoencoder.AutoencoderRecipe:
    """The DA-VAE, on all images but the held-out ones."""
    return autoencoder.AutoencoderRecipe(
        data=DataConfig(_images(size, "train", "other"), size=SIZES[size], workers=0, cache=True),
        run=RunConfig(folder(size, "autoencoder"), steps=2500, batch=4),
        base=folder(size, "base_autoencoder") / tiny.BASE_AUTOENCODER,
        optimiser=OptimiserConfig(lr=5e-4, schedule="cosine", ema=0.995, weight_decay=1e-4),
        losses=ReconstructionConfig(l1=2.0, perceptual=0.5, network="st-lpips-alex", kl=1e-7),
    )


def finished_autoencoder_recipe(size: str) -> autoencoder.AutoencoderRecipe:
    """The same DA-VAE, trained on with squared differences in place of half the others: colours and edges exact."""
    first = autoencoder_recipe(size)
    return replace(
        first,
        run=RunConfig(folder(size, "autoencoder_finish"), steps=3300, batch=4, seed=1),
        start=folder(size, "autoencoder") / tiny.AUTOENCODER,
        losses=replace(first.losses, l1=1.0, l2=6.0, perceptual=0.25),
    )


def sharpened_autoencoder_recipe(size: str) -> autoencoder.AutoencoderRecipe:
    """The same latents, decoded more sharply: the decoder alone, mostly by what a classifier sees."""
    finished = finished_autoencoder_recipe(size)
    return replace(
        finished,
        run=RunConfig(folder(size, "autoencoder_sharpen"), steps=850, batch=4, seed=2),
        start=folder(size, "autoencoder_finish") / tiny.AUTOENCODER,
        freeze_detail=True,
        optimiser=replace(finished.optimiser, lr=2e-4, ema=0.99),
        losses=replace(finished.losses, l1=1.0, l2=0.0, perceptual=2.0),
        alignment=autoencoder.AlignmentConfig(weight=0.0),
    )


def robust_autoencoder_recipe(size: str) -> autoencoder.AutoencoderRecipe:
    """The same latents, decoded so that a sampler's errors do not show: the decoder alone, on noised latents."""
    sharpened = sharpened_autoencoder_recipe(size)
    return replace(
        sharpened,
        run=RunConfig(folder(size, "autoencoder_robust"), steps=2000, batch=4, seed=3),
        start=folder(size, "autoencoder_sharpen") / tiny.AUTOENCODER,
        losses=replace(sharpened.losses, l1=1.0, l2=2.0, perceptual=1.5),
        latent_noise=0.5,
    )


def adapter_recipe(size: str) -> adapter.AdapterRecipe:
    """The adapter, on the captioned images."""
    return adapter.AdapterRecipe(
        data=DataConfig(_images(size, "train"), size=SIZES[size], flip=False, workers=0, cache=True),
        run=RunConfig(folder(size, "adapter"), steps=15000, batch=64),
        model=folder(size, "base_dit") / tiny.MODEL,
        text_encoder=folder(size, "base_dit") / tiny.TEXT_ENCODER,
        autoencoder=folder(size, "autoencoder_finish") / tiny.AUTOENCODER,
        optimiser=OptimiserConfig(lr=6e-4, schedule="cosine", ema=0.999),
        flow=FLOW,
        rank=64,
        targets=PAPER_TARGETS,
        detail_warmup=500,
        keep_latents=True,
        recommended=Recommended(SIZES[size], shift=FLOW.shift, cfg=1.5, steps=30),
    )


def finished_adapter_recipe(size: str) -> adapter.AdapterRecipe:
    """The same adapter with twice the rank, trained on."""
    first = adapter_recipe(size)
    return replace(
        first,
        run=RunConfig(folder(size, "adapter_finish"), steps=14000, batch=64),
        start=folder(size, "adapter") / tiny.ADAPTER,
        rank=2 * first.rank,
        detail_warmup=0,
    )


def redrawn_autoencoder_recipe(size: str) -> autoencoder.AutoencoderRecipe:
    """The same latents, decoded as the adapted model draws them: the decoder alone, on latents that it has drawn over.

    On the captioned images, for the others' captions are not known to the model.
    """
    robust, last = robust_autoencoder_recipe(size), finished_adapter_recipe(size)
    return replace(
        robust,
        data=replace(robust.data, images=_images(size, "train"), flip=False),
        run=RunConfig(folder(size, "autoencoder_redrawn"), steps=1600, batch=4, seed=4),
        losses=replace(robust.losses, gradient=0.5, perceptual=1.75),
        start=folder(size, "autoencoder_robust") / tiny.AUTOENCODER,
        redraw=RedrawConfig(
            share=0.7,
            model=last.model,
            adapter=folder(size, "adapter_finish") / tiny.ADAPTER,
            text_encoder=last.text_encoder,
        ),
        latent_noise=0.4,
        detail_dropout=0.05,
    )


def few_steps_recipe(size: str) -> few_steps.FewStepsRecipe:
    """The few-step LoRA, on all captions but the held-out ones."""
    last = finished_adapter_recipe(size)
    return few_steps.FewStepsRecipe(
        data=DataConfig(_images(size, "train", "other"), size=SIZES[size], workers=0),
        run=RunConfig(folder(size, "few_steps"), steps=1500, batch=32),
        model=last.model,
        adapter=folder(size, "adapter_finish") / tiny.ADAPTER,
        autoencoder=folder(size, "autoencoder_redrawn") / tiny.AUTOENCODER,
        text_encoder=last.text_encoder,
        optimiser=OptimiserConfig(lr=5e-4, schedule="cosine", ema=0.995),
        rank=32,
    )


def predictor_recipe(size: str) -> predictor.PredictorRecipe:
    """The predictor of the detail, on variants of all images but the held-out ones and of those of other sets, which it
    remembers otherwise; by the latents alone. Narrow, so that a prediction takes a twentieth of a decoding."""
    return predictor.PredictorRecipe(
        data=DataConfig(_images(size, "train", "other", "more"), size=SIZES[size], flip=False, workers=0, cache=True),
        run=RunConfig(folder(size, "predictor"), steps=3000, batch=64),
        autoencoder=folder(size, "autoencoder_redrawn") / tiny.AUTOENCODER,
        optimiser=OptimiserConfig(lr=1e-3, schedule="cosine", ema=0.999),
        losses=ReconstructionConfig(l1=0.0, perceptual=0.0, kl=0.0),
        width=96,
        base_noise=0.15,
        vary=True,
        variants=3,
        keep_latents=True,
    )


def finished_predictor_recipe(size: str) -> predictor.PredictorRecipe:
    """The same predictor, trained on by the pictures that the decoder makes of what it predicts."""
    first = predictor_recipe(size)
    return replace(
        first,
        run=RunConfig(folder(size, "predictor_finish"), steps=1000, batch=4),
        start=folder(size, "predictor") / tiny.PREDICTOR,
        optimiser=replace(first.optimiser, lr=3e-4, ema=0.99),
        losses=ReconstructionConfig(l1=1.0, l2=4.0, perceptual=1.5, network="st-lpips-alex", kl=0.0),
        latent=0.1,
    )


def tiny_decoder_recipe(size: str) -> tiny_decoder.TinyDecoderRecipe:
    """The tiny decoder, on all images but the held-out ones: narrow, for the decoder it stands in for is small, too."""
    return tiny_decoder.TinyDecoderRecipe(
        data=DataConfig(_images(size, "train", "other"), size=SIZES[size], flip=False, workers=0, cache=True),
        run=RunConfig(folder(size, "tiny_decoder"), steps=5000, batch=8),
        autoencoder=folder(size, "autoencoder_redrawn") / tiny.AUTOENCODER,
        optimiser=OptimiserConfig(lr=2e-3, schedule="cosine", ema=0.998),
        losses=ReconstructionConfig(l1=1.0, l2=2.0, perceptual=1.5, network="st-lpips-alex", kl=0.0),
        perceptual_start=3000,
        widths=(48, 32, 24, 16, 16),
        keep_latents=True,
    )


_ABOUT = {"micro": "64 px base, 128 px images, 16 tokens", "tiny": "128 px base, 256 px images, 64 tokens"}

BASE_AUTOENCODER = {size: (about, base_autoencoder_recipe(size)) for size, about in _ABOUT.items()}
BASE_DIT = {size: (about, base_dit_recipe(size)) for size, about in _ABOUT.items()}
AUTOENCODER = {size: (about, autoencoder_recipe(size)) for size, about in _ABOUT.items()}
AUTOENCODER |= {f"{size}-finish": (about, finished_autoencoder_recipe(size)) for size, about in _ABOUT.items()}
AUTOENCODER |= {f"{size}-sharpen": (about, sharpened_autoencoder_recipe(size)) for size, about in _ABOUT.items()}
AUTOENCODER |= {f"{size}-robust": (about, robust_autoencoder_recipe(size)) for size, about in _ABOUT.items()}
AUTOENCODER |= {f"{size}-redrawn": (about, redrawn_autoencoder_recipe(size)) for size, about in _ABOUT.items()}
ADAPTER = {size: (about, adapter_recipe(size)) for size, about in _ABOUT.items()}
ADAPTER |= {f"{size}-finish": (about, finished_adapter_recipe(size)) for size, about in _ABOUT.items()}
FEW_STEPS = {size: (about, few_steps_recipe(size)) for size, about in _ABOUT.items()}
PREDICTOR = {size: (about, predictor_recipe(size)) for size, about in _ABOUT.items()}
PREDICTOR |= {f"{size}-finish": (about, finished_predictor_recipe(size)) for size, about in _ABOUT.items()}
TINY_DECODER = {size: (about, tiny_decoder_recipe(size)) for size, about in _ABOUT.items()}
