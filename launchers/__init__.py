"""The `tessera` command and the ways to start a run."""
