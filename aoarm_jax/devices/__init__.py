"""Meshes, processes, and what a compiled program does on them."""
