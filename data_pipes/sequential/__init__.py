"""Each sample once, in the manifest's order: what evaluation reads."""
