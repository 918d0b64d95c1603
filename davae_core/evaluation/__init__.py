"""Measuring what comes out: reconstructions, drawings against their own pictures, recall, and reports of them."""
