"""The ablation bench: variants of the method, trained alike and measured by what they draw."""
