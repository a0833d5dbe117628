"""What fails while a model runs is a message, on the command line and in the API."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

import moec
from moec.runtime.inputs.prompt import compose
from moec.runtime.sampling import sample
from moec.spec.errors import MoecError
from tests.damage import listed_again
from tests.refusals import one_message, refusal


def _fails_when_it_runs(model: Path) -> None:
    """Plant a Reshape that ONNX Runtime accepts when it loads, and cannot compute."""
    graph = onnx.load(model, load_external_data=False)
    first = graph.graph.node[0]
    shape = onnx.helper.make_tensor("planted.shape", onnx.TensorProto.INT64, [2], [7919, -1])
    graph.graph.initializer.append(shape)
    ids = onnx.helper.make_node("Reshape", ["input_ids", "planted.shape"], ["planted"])
    back = onnx.helper.make_node("Shape", ["input_ids"], ["planted.back"])
    flat = onnx.helper.make_node("Reshape", ["planted", "planted.back"], ["planted.ids"])
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            if name == "input_ids":
                node.input[i] = "planted.ids"
    assert first in graph.graph.node
    for i, node in enumerate((ids, back, flat)):
        graph.graph.node.insert(i, node)
    model.write_bytes(graph.SerializeToString())
    listed_again(model.parent, model.name)


def test_a_graph_that_fails_when_it_runs(
    cli: Callable[..., tuple[int, str]], artefact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _fails_when_it_runs(artefact / "model.onnx")
    session = moec.open_session(artefact)
    for call in (
        lambda: session.logits([[1, 2]]),
        lambda: session.generate([[1, 2]], max_new_tokens=2),
        lambda: session.prefill([[1, 2]]),
    ):
        error = refusal(call, "Reshape", code=1)
        assert error.__cause__ is not None and "onnxruntime" in error.where
    code, err = cli("generate", artefact, "--ids", "1,2")
    one_message(err, "Reshape")
    assert code == 1 and "a bug of moec" not in err
    assert capfd.readouterr().err == "", "the library itself prints no names of the graph"


def test_an_error_of_the_callers_own_function_stays_its_own(built: Path) -> None:
    def show(step: list[int | None]) -> None:
        raise BrokenPipeError("mine")

    with pytest.raises(BrokenPipeError, match="mine"):
        moec.open_session(built).generate([[1]], max_new_tokens=1, stream=show)


def test_a_temperature_close_to_zero_takes_the_largest() -> None:
    logits = torch.tensor([[0.5, 3.0, -2.0], [9.0, 3.0, 9.5]])
    for temperature in (1e-320, 5e-324, 1e-308):
        assert sample(logits, temperature, 2, 0.9).tolist() == [1, 2]


def test_logits_that_are_no_numbers_are_refused() -> None:
    for bad in (torch.nan, torch.inf):
        refusal(lambda bad=bad: sample(torch.tensor([[1.0, bad]]), 0.7), "logits", code=1)


@pytest.mark.parametrize("text", ["x \ud83d y", "caf\udce9 = 1"])
def test_a_prompt_that_is_no_text_is_refused(
    tiny: Path, tiny_onnx: Path, cli: Callable[..., tuple[int, str]], text: str
) -> None:
    assert "surrogate" in str(refusal(lambda: moec.encode(tiny, text), "prompt"))
    with pytest.raises(MoecError):
        compose(None, None, text)  # type: ignore[arg-type]  # before anything else is read
    code, err = cli("generate", tiny_onnx, "--prompt", text)
    one_message(err, "surrogate")
    assert code == 2
