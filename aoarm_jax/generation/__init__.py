"""Generation of texts: prompts, the law of one draw, and decoding."""
