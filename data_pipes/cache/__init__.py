"""A node's cache of remote chunks: a hard cap, shared by its processes, safe against kills."""
