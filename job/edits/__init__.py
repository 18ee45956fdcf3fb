"""Edits of residual writers: weights prepared once, edits compiled per batch and applied by hooks."""
