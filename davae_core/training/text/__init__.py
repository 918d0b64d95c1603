"""Captions, and what a model reads of them."""
