"""Numbers that keep the random keys of one seed apart.

Each purpose of random numbers has a number below. A key is folded with the
number of its purpose, so two purposes never draw the same numbers. Training
folds its key with the step, and a step stays below 2^31.
"""

# These are folded into jax.random.key(seed). The seed may be that of training.
EVALUATION = 101
GENERATION = 102
SCORING = 103
STUDY_TEXTS = 104
STUDY_ATTENTION = 105
LENGTHS = 106
STUDY_KNOCKOUTS = 107
BENCHMARK = 108

# This is folded into the key of the first parameters, for adapters beside them.
ADAPTERS = 109

# These are folded into the key of one training step or one evaluation. The
# numbers of rows and draws stay below 2^29.
GROUPS, RANKS, TIMES, MASKS = (2**31 + number for number in range(4))
ROWS = RANKS  # An evaluation draws no ranks, so the number is free there.

# These are folded into the key of a generated row. The draws of a row are
# numbered by slot.
COIN = 2**29
AGAIN = 2**30
