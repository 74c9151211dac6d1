"""What shards hold: tars, their indexes and manifests, a sample's bytes."""
