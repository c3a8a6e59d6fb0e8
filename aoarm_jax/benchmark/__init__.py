"""The benchmark of a trained run: likelihood, orders, infilling, generation."""
