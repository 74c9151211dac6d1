"""Bytes per rank before a run starts."""
