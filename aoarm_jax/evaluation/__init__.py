"""Likelihoods of a split of the text, and of given texts."""
