"""Edits found by gradient: differentiable hooks, losses on prompts, targets, and the descent."""
