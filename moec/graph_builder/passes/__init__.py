"""Rewrites of a built graph, one a file."""
