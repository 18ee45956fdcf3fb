"""Settings: their schema and sources, and which may come from files of others."""
