"""Time several engines on one model: opening, first token, decoding, and memory.

A lane is one engine on one artefact, in its own process. Lanes take turns in rounds, so that a
slow minute of a shared machine affects all of them. The figures are medians over the rounds.
"""

import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moec.artefact.artefact import open_artefact
from moec.artefact.process_memory import memory
from moec.artefact.session_options import SETS
from moec.runtime.bench.transformers import ENGINES as PEERS
from moec.runtime.bench.transformers import open_transformers
from moec.runtime.open import find_engine, open_session
from moec.spec.errors import MoecError
from moec.spec.plan import plan


@dataclass(frozen=True, slots=True)
class Lane:
    """One engine on one artefact.

    `preset` names session options of ONNX Runtime; it is "" for other engines. `weights_from` and
    `trust_engines` are those of `open_session`.
    """

    path: str
    engine: str
    preset: str = ""
    device: str = "cpu"
    weights_from: str | Path | None = None
    trust_engines: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """The figures of a lane. Memory is that of the lane's process after the run, in bytes.

    `anonymous_bytes` is the process's own memory, with copies of weights. `mapped_bytes` are pages
    of files, which the operating system can drop. `peak_bytes` is the largest sum of both.
    `bytes_per_token` are the bytes that the model must read to decode one token of one sequence.
    `bandwidth_share` is that times tokens per second, divided by the bandwidth that this machine
    reached in the same run; it is None for batches and GPUs, where it has no meaning. `error` says
    why there are no figures.
    """

    artefact: str
    engine: str
    preset: str
    precision: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    open_s: float = float("nan")
    first_token_s: float = float("nan")
    decode_tokens_per_s: float = float("nan")
    anonymous_bytes: int = 0
    mapped_bytes: int = 0
    peak_bytes: int = 0
    weights_bytes: int = 0
    bytes_per_token: int = 0
    bandwidth_share: float | None = None
    error: str = ""

    def to_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return asdict(self)


class Engine(Protocol):
    """The interface of what a lane runs. Sessions of `moec` have it."""

    def prefill(self, ids: Tensor, *, capacity: int) -> tuple[Tensor, Any]:
        """Run ids [B, S]; return the logits of each last token [B, vocab], and a cache."""

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Run one more token of each sequence, [B]; return its logits [B, vocab]."""


def lanes_of(
    path: str | Path,
    device: str = "cpu",
    weights_from: str | Path | None = None,
    trust_engines: bool = False,
) -> list[Lane]:
    """The lanes of an artefact: its engine, the eager reference, and transformers.

    ONNX Runtime has a lane for each set of session options.
    """
    artefact = open_artefact(path, weights_from)
    name = str(path)
    engine = artefact.manifest.engine
    presets = [preset for preset in SETS if preset in artefact.manifest.presets]
    lanes = [Lane(name, engine, preset, device) for preset in presets or [""]]
    if device == "cpu" and not artefact.manifest.packings:
        lanes.append(Lane(name, "eager"))
    if artefact.checkpoint:
        lanes += [Lane(name, peer, device=device) for peer in PEERS]
    return [replace(x, weights_from=weights_from, trust_engines=trust_engines) for x in lanes]


def bench(
    path: str | Path,
    *,
    batch: int = 1,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    device: str = "cpu",
    rounds: int = 3,
    weights_from: str | Path | None = None,
    trust_engines: bool = False,
) -> list[Timing]:
    """Time an artefact in its engine, in the eager reference and in transformers: `lanes_of`.

    Each lane is a process of its own that opens the model, prefills random prompts and decodes
    greedily. The calling script needs `if __name__ == "__main__":`, since the processes import it.

    Args:
        path: the artefact's folder.
        batch: the number of sequences.
        prompt_tokens: the prompt tokens of each sequence.
        new_tokens: the tokens to add to each sequence.
        device: "cpu" or "cuda".
        rounds: how often each lane is timed; figures are medians.
        weights_from: the folder of the weights, as in `open_session`.
        trust_engines: as in `open_session`.

    Returns:
        One timing for each lane; a lane that fails says why in its `error`.

    Raises:
        MoecError: `path` is no artefact.
    """
    if device != "cpu":
        artefact = open_artefact(path)
        find_engine(artefact).check(artefact, device)
    lanes = lanes_of(path, device, weights_from, trust_engines)
    return race(lanes, batch, prompt_tokens, new_tokens, rounds)


def race(
    lanes: Sequence[Lane],
    batch: int = 1,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    rounds: int = 3,
    open_engine: Callable[[Lane], Engine] | None = None,
) -> list[Timing]:
    """Time `lanes` in turns. Each process calls `open_engine`, which may know further engines."""
    job = (open_engine or open_lane, batch, prompt_tokens, new_tokens)
    with _processes(lanes, job) as pipes:
        opened = [_answer(pipe) for pipe in pipes]  # after one turn that warms up
        turns: list[list[Any]] = [[] for _ in lanes]
        for _ in range(rounds):
            for pipe, first, mine in zip(pipes, opened, turns, strict=True):
                if not any(isinstance(each, str) for each in (first, *mine)):
                    mine.append(_answer(pipe, "go"))
        bandwidth = read_bandwidth()
        memories = [
            None if any(isinstance(each, str) for each in (first, *mine)) else _answer(pipe, "end")
            for pipe, first, mine in zip(pipes, opened, turns, strict=True)
        ]
    return [
        _timing(lane, (batch, prompt_tokens, new_tokens), first, mine, held, bandwidth)
        for lane, first, mine, held in zip(lanes, opened, turns, memories, strict=True)
    ]


def read_bandwidth(size: int = 1 << 28, tries: int = 5) -> float:
    """Measure the bytes per second at which all cores read a large tensor: the best of `tries`."""
    numbers = torch.ones(size)
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return 4 * size / best


def _timing(
    lane: Lane,
    sizes: tuple[int, int, int],
    opened: Any,
    turns: list[Any],
    held: Any,
    bandwidth: float,
) -> Timing:
    manifest = open_artefact(lane.path).manifest
    batch, prompt, new = sizes
    unquantised = lane.engine in (*PEERS, "eager")
    precision = manifest.compute if unquantised else manifest.precision
    stored = sum(shard.size for shard in manifest.weights.shards.values())
    shown = (lane.path, lane.engine, lane.preset, precision, batch, prompt, new)
    failed = next((each for each in (opened, *turns, held) if isinstance(each, str)), None)
    if failed is not None:
        return Timing(*shown, error=failed)
    rate = batch * new / statistics.median(decode for _, decode in turns)
    # Weights that are left in place are read in their stored type, except with the session options
    # `fast`, which cast them once.
    mapped = not manifest.packings and (lane.engine == "eager" or lane.preset == "lean")
    spec = manifest.spec
    if lane.engine in PEERS:  # transformers dequantises weights
        spec = spec.model_copy(update={"scheme": None})
    read = spec.dtype if mapped else precision
    read = spec.scheme.precision if spec.scheme else read
    needed = plan(spec, read, context=prompt + new).decode_read_bytes
    has_share = batch == 1 and lane.device == "cpu"
    return Timing(
        *shown,
        open_s=opened,
        first_token_s=statistics.median(first for first, _ in turns),
        decode_tokens_per_s=rate,
        anonymous_bytes=held.anonymous,
        mapped_bytes=held.mapped,
        peak_bytes=held.peak,
        weights_bytes=stored,
        bytes_per_token=needed,
        bandwidth_share=needed * rate / bandwidth if has_share else None,
    )


@contextmanager
def _processes(lanes: Sequence[Lane], job: tuple[Any, ...]) -> Iterator[list[Connection]]:
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for lane in lanes:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_run, args=(theirs, lane, *job), daemon=True)
            # Ctrl-C goes to every process of a terminal: this one ends the lanes.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            pipes.append(ours)
            processes.append(process)
            ours.poll(None)  # lanes open one by one, so that none slows another
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(pipe: Connection, word: str | None = None) -> Any:
    """Send `word` to a lane, if given, and return its answer; a string is an error message."""
    try:
        if word:
            pipe.send(word)
        return pipe.recv()
    except (EOFError, OSError):
        return "its process died, probably because it ran out of memory"


def _run(
    pipe: Connection,
    lane: Lane,
    open_engine: Callable[[Lane], Engine],
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
) -> None:
    try:
        start = time.perf_counter()
        engine = open_engine(lane)
        opened = time.perf_counter() - start
        vocab = open_artefact(lane.path).manifest.spec.text.vocab
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab, (batch, prompt_tokens), generator=generator)
        _turn(engine, ids, new_tokens)
        pipe.send(opened)
        while pipe.recv() == "go":
            pipe.send(_turn(engine, ids, new_tokens))
        pipe.send(memory())
    except MoecError as error:
        pipe.send(str(error))
    except Exception as error:  # the table shows the error of a lane that fails
        pipe.send(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")


def _turn(engine: Engine, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """The seconds to the first token, and the seconds for `new_tokens` more of each sequence."""
    start = time.perf_counter()
    logits, cache = engine.prefill(ids, capacity=ids.shape[1] + new_tokens)
    tokens = logits.argmax(-1).cpu()  # waits for the prompt
    first = time.perf_counter()
    for _ in range(new_tokens):
        tokens = engine.decode(tokens, cache).argmax(-1)
    tokens.cpu()  # waits for the last step, because some engines return before it is done
    return first - start, time.perf_counter() - first


def open_lane(lane: Lane) -> Engine:
    """Open the engine of a lane."""
    if lane.engine in PEERS:
        artefact = open_artefact(lane.path, lane.weights_from)
        source, dtype = artefact.checkpoint or "", artefact.manifest.compute
        return open_transformers(source, lane.engine, dtype, lane.device)
    return open_session(
        lane.path,
        lane.device,
        engine=lane.engine,
        session_options=lane.preset or "lean",
        weights_from=lane.weights_from,
        trust_engines=lane.trust_engines,
    )
