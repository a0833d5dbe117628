"""Time a session: opening, first token, decode."""

import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moec.runtime.session import open_session


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds and tokens per second of one engine; `peak_bytes` is the process's so far."""

    engine: str
    preset: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    open_s: float
    first_token_s: float
    decode_tokens_per_s: float
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
    """Open `path`, prefill `batch` rows of random tokens, decode greedily; one warm-up first."""
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
    return Timing(
        engine, preset, batch, prompt_tokens, new_tokens, opened, first,
        batch * new_tokens / decode, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip
