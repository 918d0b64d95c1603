"""Measuring what comes out: perceptual distance, and plain numbers on images."""

from ..perceptual import PerceptualDistance, PerceptualName, load_perceptual
from .metrics import high_frequency_energy, pooled_distance, psnr, resize_bicubic

__all__ = [
    "PerceptualDistance",
    "PerceptualName",
    "high_frequency_energy",
    "load_perceptual",
    "pooled_distance",
    "psnr",
    "resize_bicubic",
]
