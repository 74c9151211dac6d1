"""Protocols and the suite of encoders."""
