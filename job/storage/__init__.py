"""The run folder, its records and events, written atomically."""
