"""A model's files and the loaded model."""
