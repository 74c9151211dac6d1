"""Metrics and the suite of tokenizers."""
