"""A session: one engine, the caches around it, and the loop that generates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.exporters.artefact import Artefact, open_artefact
from moec.exporters.manifest import NAME
from moec.runtime.cache import Cache, grow, new_cache
from moec.runtime.eager import Run, eager_engine
from moec.runtime.ort import PRESETS, ort_engine
from moec.runtime.sampling import sample
from moec.spec.errors import MoecError
from moec.spec.files import load_spec
from moec.spec.model import ModelSpec
from moec.weights.checkpoint import read_checkpoint
from moec.weights.name_map import match

#: tokens of a prompt that go through the graph at once; bounds the memory of masks and logits
PIECE = 1024

Ids = Tensor | np.ndarray[Any, Any] | Sequence[Sequence[int]] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Session:
    """Run a decoder. Inputs are int token ids: a tensor, an array, or rows of different length.

    Rows of different length are lists of lists, or a right-padded tensor with `lengths`. Results
    are tensors where the input was one, else numpy arrays.
    """

    spec: ModelSpec
    precision: str
    engine: str
    run: Run
    artefact: Artefact | None = None

    def logits(self, input_ids: Ids, lengths: Ids | None = None) -> Any:
        """int64 [B, S] -> float32 [B, S, vocab]; no cache involved.

        Positions past a row's length hold no meaning.
        """
        ids, counts = self._rows(input_ids, lengths)
        cache = new_cache(self.spec, self.precision, len(ids), 0)
        every = torch.arange(ids.shape[1]).expand(len(ids), -1)
        return _like(input_ids, self._step(ids, counts, every, cache)["logits"])

    def prefill(
        self, input_ids: Ids, lengths: Ids | None = None, capacity: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Logits of each row's last token, float32 [B, vocab], and the cache after it.

        `capacity` is the number of positions to make room for; the cache grows past it if needed.
        """
        ids, counts = self._rows(input_ids, lengths)
        cache = new_cache(self.spec, self.precision, len(ids), capacity or ids.shape[1])
        return self.extend(ids, counts, cache), cache

    def decode(self, tokens: Ids, cache: Cache) -> Tensor:
        """One more token a row, int64 [B] -> its logits, float32 [B, vocab]; `cache` is updated."""
        column = torch.as_tensor(tokens)[:, None]
        return self.extend(column, torch.ones(len(column), dtype=torch.int64), cache)

    def extend(self, ids: Tensor, lengths: Tensor, cache: Cache) -> Tensor:
        """Append ids [B, S], of which each row owns its first `lengths`, in pieces.

        Returns the logits of each row's last own token, float32 [B, vocab]; rows of length 0 get
        zeros and keep their cache.
        """
        self._check_ids(ids)
        needed = int((cache.lengths + lengths).max())
        if needed > cache.capacity:
            grow(self.spec, cache, max(needed, 2 * cache.capacity))
        last = torch.zeros(len(ids), self.spec.text.vocab)
        for start in range(0, ids.shape[1], PIECE):
            piece = ids[:, start : start + PIECE]
            own = (lengths - start).clamp(0, piece.shape[1])
            index = (own - 1).clamp(min=0)[:, None]
            out = self._step(piece, own, index, cache)
            ends = (own > 0) & (lengths <= start + piece.shape[1])
            last[ends] = out["logits"][ends, 0]
            for name in cache.tensors:
                cache.tensors[name] = out[name.replace("past", "present", 1)]
            cache.lengths = cache.lengths + own
        return last

    def generate(
        self,
        input_ids: Ids,
        max_new_tokens: int = 64,
        *,
        lengths: Ids | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
        stream: Callable[[list[int | None]], None] | None = None,
    ) -> Any:
        """Continue each row; the prompt is included, rows that end early are padded on the right.

        Args:
            max_new_tokens: tokens to add at most.
            temperature: 0 is greedy.
            top_k, top_p: keep the k likeliest tokens, or the likeliest that reach share p.
            seed: of the sampling.
            stop: tokens that end a row; default the model's own.
            stream: called with each step's tokens, None for rows that have ended.
        """
        _check_sampling(temperature, top_k, top_p, seed)
        ids, counts = self._rows(input_ids, lengths)
        if max_new_tokens < 1:
            return _like(input_ids, ids)
        ends = set(self.spec.tokens.eos if stop is None else stop)
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        rows = [row[:n].tolist() for row, n in zip(ids, counts, strict=True)]
        alive = torch.ones(len(rows), dtype=torch.bool)
        logits, cache = self.prefill(ids, counts, int(counts.max()) + max_new_tokens)
        for step in range(max_new_tokens):
            tokens = sample(logits, temperature, top_k, top_p, generator)
            new = [int(t) if on else None for t, on in zip(tokens, alive, strict=True)]
            for row, token in zip(rows, new, strict=True):
                row += [] if token is None else [token]
            if stream:
                stream(new)
            alive = torch.tensor([token is not None and token not in ends for token in new])
            if not alive.any() or step + 1 == max_new_tokens:
                break
            logits = self.extend(tokens[:, None], alive.long(), cache)
        longest = max(map(len, rows))
        pad = next((t for t in (self.spec.tokens.pad, *self.spec.tokens.eos) if t is not None), 0)
        return _like(input_ids, torch.tensor([row + [pad] * (longest - len(row)) for row in rows]))

    def _step(
        self, ids: Tensor, lengths: Tensor, logit_index: Tensor, cache: Cache
    ) -> dict[str, Tensor]:
        return self.run(
            {
                "input_ids": ids,
                "past_lengths": cache.lengths,
                "lengths": lengths,
                "logit_index": logit_index,
                **cache.tensors,
            }
        )

    def _rows(self, input_ids: Ids, lengths: Ids | None) -> tuple[Tensor, Tensor]:
        """Right-padded int64 [B, S] and lengths [B] of whatever the caller gave."""
        try:
            return self._padded(input_ids, lengths)
        except (TypeError, ValueError, OverflowError) as error:
            raise _bad_ids(f"{error}", "integers [batch, sequence], or rows of integers") from None

    def _padded(self, input_ids: Ids, lengths: Ids | None) -> tuple[Tensor, Tensor]:
        if not isinstance(input_ids, Tensor | np.ndarray):
            given = list(input_ids)
            nested = [row if isinstance(row, Sequence) else given for row in given]
            rows = nested if given and isinstance(given[0], Sequence) else [given]
            lengths = [len(row) for row in rows] if lengths is None else lengths
            longest = max(map(len, rows), default=0)
            input_ids = np.array([list(row) + [0] * (longest - len(row)) for row in rows])
        ids = torch.as_tensor(input_ids)
        if ids.dim() != 2 or not ids.numel() or ids.dtype.is_floating_point or ids.dtype in _NO_IDS:
            raise _bad_ids(
                f"{ids.dtype} {list(ids.shape)}", "integers [batch, sequence], not empty"
            )
        ids = ids.long()
        counts = (
            torch.full((len(ids),), ids.shape[1]) if lengths is None else torch.as_tensor(lengths)
        )
        if counts.is_floating_point() or counts.shape != ids.shape[:1]:
            raise _bad_ids(f"lengths {counts.tolist()}", "one integer a row")
        if counts.min() < 1 or counts.max() > ids.shape[1]:
            raise _bad_ids(f"lengths {counts.tolist()}", f"one a row, from 1 to {ids.shape[1]}")
        self._check_ids(ids)
        return ids, counts.long()

    def _check_ids(self, ids: Tensor) -> None:
        if ids.min() < 0 or ids.max() >= self.spec.text.vocab:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise _bad_ids(f"token {bad}", f"0 to {self.spec.text.vocab - 1}")


def open_session(
    path: str | Path, device: str = "cpu", engine: str | None = None, preset: str = "lean"
) -> Session:
    """Open an artefact (`engine` "onnxruntime" or "eager") or a checkpoint folder ("eager").

    Args:
        preset: session options, "lean" (weights stay mapped) or "fast" (folded and prepacked).

    Raises:
        MoecError: no artefact, no weights, changed weights (exit code 2), or a device or package
            that is not there (3).
    """
    if device != "cpu":
        raise MoecError(
            f"device {device}", "not in this version", "cpu", "use device cpu", exit_code=3
        )
    path = Path(path)
    for name, given, known in (
        ("engine", engine, (None, "onnxruntime", "eager")),
        ("preset", preset, tuple(PRESETS)),
    ):
        if given not in known:
            expected = " or ".join(filter(None, known))
            raise MoecError(f"{name} {given}", f"no such {name}", expected, "choose one of them")
    if not (path / NAME).is_file() and (path / "config.json").is_file():
        if engine == "onnxruntime":
            raise MoecError(
                path, "a checkpoint", "an artefact for engine onnxruntime",
                f"python cli.py build --checkpoint {path}",
            )  # fmt: skip
        spec = load_spec(path)
        entries = match(spec, read_checkpoint(path))
        return Session(spec, "fp32", "eager", eager_engine(spec, entries))
    artefact = open_artefact(path)
    spec, precision = artefact.manifest.spec, artefact.manifest.precision
    if engine in (None, "onnxruntime"):
        return Session(spec, precision, "onnxruntime", ort_engine(artefact, preset), artefact)
    run = eager_engine(spec, artefact.entries(), precision)
    return Session(spec, precision, "eager", run, artefact)


_NO_IDS = (torch.bool, torch.complex64, torch.complex128)


def _bad_ids(found: str, expected: str) -> MoecError:
    return MoecError("input_ids", found, expected, "check the tokenizer, or the shape of the batch")


def _check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    for name, given, good, expected in (
        ("seed", seed, seed is None or 0 <= seed < 2**63, "0 to 2^63 - 1"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not good:
            raise MoecError(name, given, expected, f"correct --{name.replace('_', '-')}")


def _like(given: object, result: Tensor) -> Any:
    return result if isinstance(given, Tensor) else result.numpy()
