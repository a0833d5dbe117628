"""Time a session: opening, first token, decode, and what it keeps in memory."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moec.exporters.artefact import open_artefact
from moec.exporters.memory import memory
from moec.runtime.session import open_session


@dataclass(frozen=True, slots=True)
class Timing:
    """One engine in a process of its own. Memory is that process's after the run.

    `anonymous_bytes` is its own memory, copies of weights included; `mapped_bytes` are pages of
    files, which the system can drop; `peak_bytes` is the most of both.
    """

    engine: str
    preset: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    open_s: float
    first_token_s: float
    decode_tokens_per_s: float
    anonymous_bytes: int
    mapped_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def bench(
    path: str | Path,
    engine: str = "onnxruntime",
    preset: str = "lean",
    batch: int = 1,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
) -> Timing:
    """Open `path`, prefill `batch` rows of random tokens, decode greedily; one warm-up first.

    Raises:
        MoecError: `path` cannot be opened with that engine.
    """
    open_artefact(path)  # refuse in this process, before another is started
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(
            _measure, path, engine, preset, batch, prompt_tokens, new_tokens
        ).result()


def _measure(
    path: str | Path, engine: str, preset: str, batch: int, prompt_tokens: int, new_tokens: int
) -> Timing:
    start = time.perf_counter()
    session = open_session(path, engine=engine, preset=preset)
    opened = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, session.spec.text.vocab, (batch, prompt_tokens), generator=generator)
    first = decode = 0.0
    for _ in range(2):  # the first run touches pages and fills allocators
        start = time.perf_counter()
        logits, cache = session.prefill(ids, capacity=prompt_tokens + new_tokens)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(new_tokens):
            logits = session.decode(logits.argmax(-1), cache)
        decode = time.perf_counter() - start
    held = memory()
    return Timing(
        engine, preset, batch, prompt_tokens, new_tokens, opened, first,
        batch * new_tokens / decode, held.anonymous, held.mapped, held.peak,
    )  # fmt: skip
