"""Edited weights on disk: written, verified, described, and reproduced from reproduce.json."""
