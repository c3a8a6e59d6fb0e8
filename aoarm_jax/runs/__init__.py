"""Everything that a run leaves: checkpoints, metrics, logs, pictures; reading it."""
