"""Where this command was started from once."""

raise SystemExit("type: python -m davae_core.training text")
