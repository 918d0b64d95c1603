"""Where this module was started from once."""

raise SystemExit("type: python -m davae_core.training base_autoencoder")
