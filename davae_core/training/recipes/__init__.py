"""All recipes by the name they have on a command line: name to (one line about it, recipe)."""

from . import flux_vae, imagenet, sd3_vae, sd35m, tiny

BASE_AUTOENCODER = tiny.BASE_AUTOENCODER
BASE_DIT = tiny.BASE_DIT
AUTOENCODER = tiny.AUTOENCODER | sd3_vae.AUTOENCODER | flux_vae.AUTOENCODER | imagenet.AUTOENCODER
ADAPTER = tiny.ADAPTER | sd35m.ADAPTER
FEW_STEPS = tiny.FEW_STEPS | sd35m.FEW_STEPS
PREDICTOR = tiny.PREDICTOR | sd3_vae.PREDICTOR | flux_vae.PREDICTOR
TINY_DECODER = tiny.TINY_DECODER | sd3_vae.TINY_DECODER | flux_vae.TINY_DECODER
