"""From pixels to training samples: crops, flips, clips; seeded by the sample's position."""
