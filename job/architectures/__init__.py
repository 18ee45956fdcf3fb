"""Which modules of a model write into the residual stream, found by what they do and proven."""
