"""Launchers: each starts the training command on processes, hosts or pods."""
