"""Checkpoints: written beside training, complete or not there, read without running anything."""
