"""Which sample is at which position: pure functions of the seed and the position."""
