"""Weights that moec writes itself: packed files, a few rows at a time, resumable, with hashes."""
