"""Downstream evaluation: one file per protocol."""
