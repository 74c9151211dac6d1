"""Finds and loads trained weights, whoever trained them."""
