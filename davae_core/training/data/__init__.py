"""Images and what is computed of them once."""
