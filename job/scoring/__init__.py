"""How a model answers: refusals, KL divergence, broken and incoherent answers."""
