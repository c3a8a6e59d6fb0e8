"""Numbers that keep random keys of one seed apart.

A key is folded with the number of its purpose, so that two purposes never draw
the same numbers. Training folds its key with the step, which stays below 2^31.
"""

# Folded into jax.random.key(seed), where the seed may be that of training.
EVALUATION = 101
GENERATION = 102
SCORING = 103
STUDY_TEXTS = 104
STUDY_ATTENTION = 105

# Folded into the key of one training step, or of one evaluation. Rows and draws
# are numbered below 2^29.
GROUPS, RANKS, TIMES, MASKS = (2**31 + number for number in range(4))
ROWS = RANKS  # An evaluation draws no ranks.

# Folded into the key of a generated row, whose draws are numbered by slot.
COIN = 2**29
AGAIN = 2**30
