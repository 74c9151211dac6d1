"""The journal of a run, and the thread that replays it to MLflow."""
