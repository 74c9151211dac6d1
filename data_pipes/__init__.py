"""From plain WebDataset tar shards to batches of uint8 tensors, in an order that is a pure function of the position."""
