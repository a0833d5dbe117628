"""Weights of 4-bit integers in ONNX, by the dialects that read them."""
