"""Pictures and videos to shards."""
