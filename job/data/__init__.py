"""Prompts: their sources, cleaning and splits."""
