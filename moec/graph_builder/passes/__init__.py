"""Passes: each file has a function that rewrites a built graph in place."""
