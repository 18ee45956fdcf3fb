"""The stages of a run between preflight and report: model, directions, search, choice, export, delivery."""
