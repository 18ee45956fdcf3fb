"""The truth test: ablating all residual writers keeps a direction out of the stream."""
