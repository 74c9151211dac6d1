"""Models: `forward` reads like the paper; no module here knows about processes."""
