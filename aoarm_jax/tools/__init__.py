"""Tools beside the main job: what costs how much."""
