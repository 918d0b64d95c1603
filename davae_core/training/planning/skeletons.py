"""The tasks with models of the right shapes and no files: SD3.5-medium, and the VAE of SD3 or FLUX.1."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ...adapter import AdapterConfig, Recommended
from ...autoencoder import Autoencoder, AutoencoderConfig
from ...bases import BASES, SD3
from ...davae import DAVAE, DAVAEConfig
from ...embeddings import Embeddings, Encoded
from ...latent import LatentSpec
from ...mmdit import MMDiT, MMDiTConfig
from ...perceptual import perceptual_shape
from ..run.launch import Images
from ..tasks import adapter, autoencoder, few_steps, predictor, tiny_decoder
from ..tasks.adapted import frozen_model
from ..tasks.adapter import AdapterRecipe, AdapterTask
from ..tasks.autoencoder import AutoencoderRecipe, AutoencoderTask
from ..tasks.few_steps import FewStepsRecipe, FewStepsTask
from ..tasks.predictor import PredictorRecipe, PredictorTask
from ..tasks.redrawing import RedrawConfig, Redrawing
from ..tasks.tiny_decoder import TinyDecoderRecipe, TinyDecoderTask

Module = TypeVar("Module", bound=nn.Module)
Recipe = AdapterRecipe | AutoencoderRecipe | FewStepsRecipe | PredictorRecipe | TinyDecoderRecipe
Task = AdapterTask | AutoencoderTask | FewStepsTask | PredictorTask | TinyDecoderTask


class Prompts(Embeddings):
    """Embeddings of any captions.

    Args:
        tokens: of each.
        model: that reads them.
    """

    def __init__(self, tokens: int, model: MMDiTConfig) -> None:
        self.tokens, self.context, self.pooled = tokens, model.context, model.pooled

    def __call__(self, captions: Sequence[str]) -> Encoded:
        """As those out of files."""
        batch = len(captions)
        return Encoded(torch.zeros(batch, self.tokens, self.context), torch.zeros(batch, self.pooled))


def task(
    recipe: Recipe,
    images: Images,
    text: int,
    model: MMDiTConfig | None = None,
    base: AutoencoderConfig | None = None,
) -> Task:
    """A recipe's task on the device that tensors are made on.

    Args:
        recipe: its files are not read.
        images: to measure statistics on.
        text: tokens of a prompt.
        model, base: shapes of the diffusion model and of the base VAE, if not SD3.5-medium's.
    """
    run = replace(recipe.run, compile=False)
    base = base or AutoencoderConfig()
    if not isinstance(recipe, (AdapterRecipe, FewStepsRecipe)):
        network = recipe.losses.network
        distance = empty(lambda: perceptual_shape(network)) if recipe.losses.perceptual else None
    if isinstance(recipe, TinyDecoderRecipe):
        whole = empty(lambda: DAVAE(DAVAEConfig(base, base_decoder=True)))
        plain = replace(recipe, run=run, start=None, perceptual_start=0)
        return TinyDecoderTask(plain, images, tiny_decoder.Parts(whole, distance=distance))
    if isinstance(recipe, PredictorRecipe):
        whole = empty(lambda: DAVAE(DAVAEConfig(base, base_decoder=True)))
        return PredictorTask(replace(recipe, run=run, start=None), images, predictor.Parts(whole, distance=distance))
    if isinstance(recipe, AutoencoderRecipe):
        family = BASES.get(recipe.family, SD3)
        parts = autoencoder.Parts(empty(lambda: Autoencoder(base)), family, distance)
        if recipe.redraw.share:
            parts.redrawing = redrawing(recipe.redraw, model or MMDiTConfig(), text)
        made = AutoencoderTask(replace(recipe, run=run, start=None, freeze_detail=False), images, parts)
        if recipe.freeze_detail:
            autoencoder.freeze_detail(made.model, recipe)
            made.recipe = recipe
        return made
    shape = model or MMDiTConfig()
    davae = empty(lambda: DAVAE(DAVAEConfig(base, base_decoder=True)))
    if isinstance(recipe, FewStepsRecipe):
        # One step of the teacher's for a sheet, which takes what each of them takes.
        config = AdapterConfig(davae.latent, shape.hidden, shape.patch, Recommended(recipe.data.size, 4.0, 2.5, 1))
        return FewStepsTask(
            replace(recipe, run=run, start=None),
            images,
            few_steps.Parts(davae, Prompts(text, shape), stored(widened(shape)), config),
        )
    # Each step of sampling takes the same memory, and so does the second prediction of a guided one, but for a latent.
    told = replace(recipe.recommended, steps=1, cfg=1.0)
    one_step = replace(recipe, run=run, start=None, latents=None, recommended=told)
    return AdapterTask(one_step, images, adapter.Parts(davae, Prompts(text, shape), stored(shape)))


def redrawing(config: RedrawConfig, shape: MMDiTConfig, text: int) -> Redrawing:
    """An adapted model that draws over latents; each of its steps takes the same memory."""
    spec = LatentSpec()
    adapter = AdapterConfig(spec, shape.hidden, shape.patch, Recommended(shift=4.0, cfg=2.5))
    dtype = torch.bfloat16 if config.frozen == "bf16" else torch.float32
    return Redrawing(config, frozen_model(stored(widened(shape)), dtype), adapter, Prompts(text, shape))


def widened(shape: MMDiTConfig) -> MMDiTConfig:
    """The shape of a model with an adapter."""
    channels = LatentSpec().channels
    return replace(shape, in_channels=channels, out_channels=channels)


def stored(shape: MMDiTConfig) -> dict[str, torch.Tensor]:
    """A diffusion model as files hold it: in fp16, which the position table stays in."""
    return {name: tensor.half() for name, tensor in empty(lambda: MMDiT(shape)).state_dict().items()}


def empty(build: Callable[[], Module]) -> Module:
    """What ``build`` makes, with weights of no meaning."""
    with _disable_current_modes(), torch.device("meta"):
        made = build()
    state = {name: torch.full(tensor.shape, 0.01, dtype=tensor.dtype) for name, tensor in made.state_dict().items()}
    made.load_state_dict(state, assign=True)
    return made
