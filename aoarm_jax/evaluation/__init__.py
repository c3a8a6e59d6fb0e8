"""Likelihoods: of a split, of given texts."""
