"""Check, before a build, that TensorRT's parser kept the meaning of the graph."""

from collections import Counter
from typing import Any

from moec.artefact.engine_job import DTYPES, Job, Span
from moec.spec.errors import MoecError, refuse

_UNUSED = "Unused Input: "


def check_network(trt: Any, network: Any, job: Job) -> None:
    """Refuse a network that differs from the graph of `job`.

    Raises:
        MoecError: inputs, outputs or attention layers are not as they were written, or no layer
            uses an input (exit code 1).
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    _check_ports(job, "input", inputs, job.inputs)
    _check_ports(job, "output", outputs, job.outputs)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    _check_attentions(trt, layers, job)
    live = _live(layers, {tensor.name for tensor in outputs})
    check_used(job, [tensor.name for tensor in inputs if tensor.name not in live])


def check_used(job: Job, unused: list[str]) -> None:
    """Refuse a network with inputs that no layer uses; the parser drops what it does not know."""
    if unused:
        raise _changed(
            f"{job.onnx}: input {unused[0]}",
            f"nothing reads it ({len(unused)} such inputs)",
            "a network that uses every input",
        )


def unused_of(warnings: list[str]) -> list[str]:
    """The unused inputs that TensorRT names in its warnings during a build."""
    return [each.removeprefix(_UNUSED) for each in warnings if each.startswith(_UNUSED)]


def check_profiles(network: Any, job: Job) -> None:
    """Refuse optimisation profiles that do not fit the inputs.

    TensorRT itself ignores a name that is not an input.

    Raises:
        MoecError: a profile lacks an input, names one that does not exist, or has shapes that do
            not fit it; or an input is a shape tensor.
    """
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes[tensor.name] = tuple(tensor.shape)
        if tensor.is_shape_tensor:
            refuse(
                f"{job.onnx}: input {tensor.name}",
                "a shape tensor: its numbers decide about shapes",
                "sizes that come from the shapes of inputs only",
                "take the sizes from the inputs' shapes",
            )
    open_ended = [name for name, shape in shapes.items() if -1 in shape]
    if open_ended and not job.profiles:
        expected = f"a profile with shapes for {shapes[open_ended[0]]}"
        raise _bad_profile(job, open_ended[0], "no profile", expected)
    for number, profile in enumerate(job.profiles):
        for name in (*open_ended, *profile):
            where, shape = f"{name}, profile {number}", shapes.get(name)
            if shape is None:
                raise _bad_profile(job, where, "no such input", " or ".join(shapes))
            if name not in profile:
                raise _bad_profile(job, where, "not in the profile", f"shapes for {shape}")
            if not _fits(profile[name], shape):
                raise _bad_profile(job, where, profile[name], f"min <= opt <= max in {shape}")


def _fits(span: Span, shape: tuple[int, ...]) -> bool:
    if not len(span.min) == len(span.opt) == len(span.max) == len(shape):
        return False
    rows = zip(span.min, span.opt, span.max, shape, strict=True)
    return all(
        0 <= low <= middle <= high and (size == -1 or low == high == size)
        for low, middle, high, size in rows
    )


def summary(layers: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Count the layers of each kind, and the outputs of each type."""
    kinds, dtypes = Counter[str](), Counter[str]()
    for layer in layers:
        kinds[layer.type.name] += 1
        for index in range(layer.num_outputs):
            tensor = layer.get_output(index)
            dtypes[tensor.dtype.name] += 1
    return dict(kinds.most_common()), dict(dtypes.most_common())


def _check_ports(job: Job, kind: str, tensors: list[Any], wanted: dict[str, str]) -> None:
    found = {tensor.name: tensor.dtype.name for tensor in tensors}
    for name in sorted(found.keys() ^ wanted.keys()):
        raise _changed(
            f"{job.onnx}: {kind} {name}",
            "not in the network" if name in wanted else "in the network, not in the graph",
            f"the {kind}s of the graph: {', '.join(wanted)}",
        )
    for name, dtype in wanted.items():
        if found[name] != DTYPES.get(dtype):
            raise _changed(f"{job.onnx}: {kind} {name}", found[name], f"{dtype}, as in the graph")


def _check_attentions(trt: Any, layers: list[Any], job: Job) -> None:
    wanted = {"causal": "NONE", "mask": job.masked, "lengths": False}
    wanted["decomposable"] = job.decomposable
    count = 0
    for layer in layers:
        if layer.type != trt.LayerType.ATTENTION_OUTPUT:
            continue
        count += 1
        layer.__class__ = trt.IAttentionOutputLayer  # the bindings give the base class
        attention = layer.attention
        found = {
            "causal": attention.causal_kind.name,
            "mask": attention.mask is not None,
            "lengths": attention.key_value_lengths is not None
            or attention.query_lengths is not None,
            "decomposable": attention.decomposable,
        }
        for key, value in wanted.items():
            if found[key] != value:
                raise _changed(f"{job.onnx}: {layer.name}", f"{key} {found[key]}", f"{key} {value}")
    if count != job.attentions:
        raise _changed(job.onnx, f"{count} attention layers", f"{job.attentions}, as in the graph")


def _live(layers: list[Any], wanted: set[str]) -> set[str]:
    """The tensors from which the tensors `wanted` and the conditions of control flow are computed.

    Names need not be unique. A tensor counts as made by every layer that has an output of its name.
    """
    makers: dict[str, list[Any]] = {}
    stack = list(wanted)
    for layer in layers:
        for index in range(layer.num_outputs):
            tensor = layer.get_output(index)
            makers.setdefault(tensor.name, []).append(layer)
        if not layer.num_outputs:  # the trip limit of a loop, or the condition of a branch
            stack += _reads(layer)
    live = set(stack)
    while stack:
        for layer in makers.pop(stack.pop(), ()):
            fresh = [name for name in _reads(layer) if name not in live]
            live.update(fresh)
            stack += fresh
    return live


def _reads(layer: Any) -> list[str]:
    tensors = (layer.get_input(index) for index in range(layer.num_inputs))
    return [tensor.name for tensor in tensors if tensor is not None]


def _changed(where: str, found: object, expected: object) -> MoecError:
    return MoecError(
        where, found, expected, "report a bug: TensorRT changed the graph without an error", 1
    )


def _bad_profile(job: Job, where: str, found: object, expected: object) -> MoecError:
    return MoecError(
        f"{job.onnx}: input {where}", found, expected, "correct the optimisation profiles"
    )
