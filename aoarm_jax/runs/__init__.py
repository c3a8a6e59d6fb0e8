"""The files of a run: checkpoints, metrics, logs, pictures; reading a run."""
