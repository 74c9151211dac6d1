"""The engine: configuration, the training loop, models, objectives, strategies, checkpoints, evaluation and export."""
