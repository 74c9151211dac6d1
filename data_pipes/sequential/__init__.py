"""Each sample once, in the order of the manifest: what evaluation reads."""
