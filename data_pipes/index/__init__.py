"""From shards to indexes: where each sample and member lies."""
