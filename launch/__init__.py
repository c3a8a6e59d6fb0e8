"""Starts the training command on several processes, hosts or pods."""
