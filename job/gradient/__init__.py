"""Edits found by gradient descent: differentiable hooks, losses on prompts, targets, and the descent."""
