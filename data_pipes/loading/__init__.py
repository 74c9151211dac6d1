"""From positions to batches: data sets, workers, prefetching, bad samples."""
