import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder skip themselves where there is no GPU, or ONNX Runtime has none."""
    gpu = torch.cuda.is_available()
    ort = False
    if gpu:
        import onnxruntime

        ort = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    for item in items:
        path = item.path.as_posix()
        if "tests/gpu" not in path:
            continue
        if not gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        elif not ort and ("ort" in item.path.name or "ort-cuda" in item.name):
            item.add_marker(pytest.mark.skip(reason="needs onnxruntime-gpu"))
