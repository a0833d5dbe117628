"""Run TensorRT engines of TensorRT and TensorRT-RTX on a GPU.

A decode step runs as a CUDA graph (`moec.runtime.engines.cuda_graphs`) if TensorRT can capture it.
It cannot if the TensorRT engine branches, because TensorRT then waits for the GPU to know the
branch, or if the execution context says that it cannot.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.exporters.tensorrt.api import load
from moec.runtime.engines.cuda_graphs import MOVING, Replays
from moec.runtime.engines.engine import Engine, Limits, Run, compiled_limits
from moec.runtime.engines.gpu import memory_for
from moec.runtime.engines.tensorrt.fit import (
    check_gpu,
    check_version,
    engine_of,
    fits,
    no_profile,
)
from moec.runtime.engines.tensorrt.opening import ALIGNED, OpenEngine, open_engine
from moec.spec.errors import refuse
from moec.spec.names import IMAGE_FEATURES, INPUT_IDS, past_of


def tensorrt_engine(
    artefact: Artefact, part: str = "model", device: str = "cuda", trt: Any = None
) -> Run:
    """Open the TensorRT engine of a part of `artefact`, "model" or "vision", on the GPU.

    Calls update caches in place. Tests give `trt` in place of the package; it then decides what
    runs, and `device` may be "cpu".

    Raises:
        MoecError: exit code 2: there is no TensorRT engine, or there are no weights; 3: the package
            or the GPU is missing or not the one that the engine was built for, or GPU memory is
            full; 1: the engine does not load, or is not that of the artefact. Later calls raise
            it with exit code 2 for shapes that no optimisation profile covers, and with 1 if
            TensorRT fails.
    """
    built = engine_of(artefact, part).built
    if trt is None or device != "cpu":
        check_gpu(artefact, built, device)
    trt = load(built.package) if trt is None else trt
    check_version(artefact, built, trt.__version__)
    with memory_for(f"engine of {part}: {artefact.path}"):
        opened = open_engine(trt, artefact, part, device)
    capture = opened.steady and opened.stream is not None
    outputs = [name for name, io in opened.ios.items() if not io.given and not past_of(name)]
    replays: Replays | None = None
    defaults = {
        name: torch.empty(0, *io.shape[1:], dtype=io.dtype, device=device)
        for name, io in opened.ios.items()
        if name == IMAGE_FEATURES and io.given and io.shape
    }

    def call(feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return _call(opened, part, {**defaults, **feeds})

    def step(feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        nonlocal capture, replays
        if replays:
            return replays(feeds)
        results = call(feeds)  # a context knows its shapes only after a call
        capture = _capturable(opened)
        replays = Replays(call, MOVING) if capture else None
        return results

    @torch.inference_mode()
    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        decode = capture and feeds[INPUT_IDS].shape[1] == 1 and IMAGE_FEATURES not in feeds
        first = next(iter(feeds))
        with memory_for(f"a call with {first} {list(feeds[first].shape)}"):
            return dict(zip(outputs, step(feeds) if decode else call(feeds), strict=True))

    return run


def _call(opened: OpenEngine, part: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Run a call; return the outputs in the engine's order, without caches, which are updated."""
    fed = {
        name: _placed(feeds[name].to(opened.device, io.dtype))
        for name, io in opened.ios.items()
        if io.given
    }
    shapes = {name: tuple(each.shape) for name, each in fed.items()}
    context = next((context for context, spans in opened.profiles if fits(shapes, spans)), None)
    if context is None:
        raise no_profile(part, shapes, [spans for _, spans in opened.profiles])
    opened.log.errors.clear()
    for name, each in fed.items():
        opened.must(context.set_input_shape(name, shapes[name]), name)
        # An empty tensor has no address, but TensorRT wants one.
        address = each.data_ptr() or opened.memory.data_ptr()
        opened.must(context.set_tensor_address(name, address), name)
    results = {}
    for name, io in opened.ios.items():
        if io.given:
            continue
        alias, shape = opened.aliases.get(name), tuple(context.get_tensor_shape(name))
        results[name] = (
            fed[alias] if alias else torch.empty(shape, dtype=io.dtype, device=opened.device)
        )
        opened.must(context.set_tensor_address(name, results[name].data_ptr()), name)
    opened.must(_execute(opened, context), "the call failed")
    for name in [name for name in results if past_of(name)]:
        given, written = feeds[past_of(name)], results.pop(name)
        if written is not given:  # its address was not aligned, or the engine writes elsewhere
            given.copy_(written)
    return tuple(results.values())


def _placed(x: Tensor) -> Tensor:
    """`x`, contiguous and at an address that is aligned for TensorRT."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNED else x


def _execute(opened: OpenEngine, context: Any) -> bool:
    """Run `context` in the order of torch's work on the GPU."""
    if opened.stream is None:
        return bool(context.execute_async_v3(0))
    current = torch.cuda.current_stream()
    if current != torch.cuda.default_stream():
        return bool(context.execute_async_v3(current.cuda_stream))
    opened.stream.wait_stream(current)
    done = context.execute_async_v3(opened.stream.cuda_stream)
    current.wait_stream(opened.stream)
    return bool(done)


def _capturable(opened: OpenEngine) -> bool:
    context = opened.profiles[0][0]
    known = hasattr(context, "is_stream_capturable")
    return not known or bool(context.is_stream_capturable(opened.stream.cuda_stream))


def _open(artefact: Artefact, part: str, device: str, options: str, taps: Sequence[str]) -> Run:
    if taps:
        refuse(
            f"{artefact.path}: {taps[0]}",
            "a TensorRT engine, which shows no inner values",
            "no taps",
            "run its ONNX with engine interpreter",
        )
    return tensorrt_engine(artefact, part, device)


def _check(artefact: Artefact, device: str) -> None:
    check_gpu(artefact, engine_of(artefact, "model").built, device)


def _limits(artefact: Artefact, device: str) -> Limits:
    return compiled_limits(artefact, batch=True)


ENGINE = Engine("tensorrt", "tensorrt", _open, _check, _limits, queues=True)
