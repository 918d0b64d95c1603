"""Training: ``python -m davae_core.training STAGE RECIPE``. Needs this package's extra ``train``."""

from pathlib import Path

__path__.append(str(Path(__file__).with_name("moved")))  # old spellings say what to type now
