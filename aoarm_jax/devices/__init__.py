"""Meshes, processes, and the communication of compiled programs."""
