"""Passes that make fused programs of target `torch`."""
