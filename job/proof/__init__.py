"""The truth test: ablating all residual writers of a model keeps a direction out of its stream."""
