"""What a training step computes: one file per objective."""
