"""From pictures and videos to shards."""
