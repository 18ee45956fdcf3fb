"""Pure arithmetic on tensors: no settings, no files, no network."""
