"""What `precision auto` of a training means on this CPU, as a test wants it."""

from __future__ import annotations

import os

VARIABLE = "DAVAE_TEST_PRECISION"


def force() -> None:
    """Makes torch take this CPU for one with AMX (bf16), or without (fp32), where DAVAE_TEST_PRECISION says so."""
    if chosen := os.environ.get(VARIABLE):
        import torch

        torch.cpu._is_amx_tile_supported = lambda: chosen == "bf16"
