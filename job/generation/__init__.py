"""Our decoder: batches, KV caches, greedy decoding and stop markers."""
