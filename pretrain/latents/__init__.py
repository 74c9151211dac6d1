"""Latents of tokenizers: data sets of them, and pictures from them."""
