"""Measurements that anyone can run; each prints a table and takes the model organism as its model."""
