"""The training program: its state, its step, its loop, and resuming a run."""
