"""How the ONNX dialects write routing and experts."""
