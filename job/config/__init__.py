"""Settings: their schema, where each value comes from, and which may come from files of others."""
