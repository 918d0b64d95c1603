"""Recipes for full-size models: the paper's figures, each deviation commented."""
