"""How a step runs on one or many processes."""
