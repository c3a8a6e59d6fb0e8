"""The training state, the step, the loop, resuming."""
