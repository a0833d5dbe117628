"""Passes of the plain programs of target `torch`."""
