"""Prompts: where they come from, cleaned and split."""
