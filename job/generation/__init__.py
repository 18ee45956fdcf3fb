"""Greedy decoder: batches, KV caches and stop markers."""
