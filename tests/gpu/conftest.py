import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder skip themselves where ONNX Runtime has no GPU."""
    if torch.cuda.is_available():
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and onnxruntime-gpu")
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(skip)
