"""Where bytes lie: local files and object stores."""
