"""The built-in model organism: a tiny chat model with a benign stand-in for refusal."""
