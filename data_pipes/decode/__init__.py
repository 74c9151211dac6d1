"""Bytes to pixels: pictures and videos, with limits on what they may cost."""
