"""DA-VAE in plain torch: the models and the mathematics, with no knowledge of ComfyUI.

Latent order is always ``[base, detail]``; only :mod:`davae_core.checkpoints` knows any other.
"""

__version__ = "0.1.0"
