"""Edited weights on disk: written, proven, described, and made again from reproduce.json."""
