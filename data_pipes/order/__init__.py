"""Which sample stands where: pure functions of the seed and the position."""
