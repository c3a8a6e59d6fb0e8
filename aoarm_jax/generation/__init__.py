"""Texts: the law of a draw, decoding, prompts."""
