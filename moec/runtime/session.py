"""A session: one engine, the caches around it, and the loop that generates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.exporters.artefact import Artefact, Entry, open_artefact
from moec.exporters.manifest import NAME
from moec.exporters.presets import EXACT, PRESETS
from moec.exporters.tensorrt.options import EngineOptions
from moec.runtime.cache import Cache, Layout, grow, new_cache, spans
from moec.runtime.calls import LONG_PIECE, PIECE, buffered_calls, padded_calls
from moec.runtime.eager import Run, eager_engine
from moec.runtime.gpu import on_host
from moec.runtime.inputs import Ids, Pixels, check_ids, read_ids, read_tiles
from moec.runtime.interpreter import interpreter
from moec.runtime.ort import ort_engine
from moec.runtime.sampling import sample
from moec.runtime.tensorrt_engine import tensorrt_engine
from moec.runtime.torch_engine import torch_engine
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.weights.name_map import read_model
from moec.weights.view import TORCH_DTYPES

#: image tiles that go through the vision tower at once, for the same reason
TILES = 8
#: what a session may run on
ENGINES = ("onnxruntime", "torch", "tensorrt", "interpreter", "eager")


@dataclass(frozen=True, slots=True)
class Session:
    """Run a model. Token ids are integers: a tensor, an array, or rows of different length.

    Rows of different length are lists of lists, or a right-padded tensor with `lengths`. Results
    are tensors where the input was one, else numpy arrays.

    Images come as `pixel_values`, float32 [tiles, channels, height, width]: the tiles of all rows'
    images, row by row, in the order of the image tokens that they replace (`moec.encode` makes
    both). The ids hold a fixed number of image tokens for each tile. Without `pixel_values` an
    image token is a token like others.

    A session is for one thread at a time. With buffers (targets ort and torch) a call writes into
    the cache that it is given.
    """

    spec: ModelSpec
    precision: str
    engine: str
    run: Run
    artefact: Artefact | None = None
    vision: Callable[[], Run] | None = None  # opens the tower, when it is first wanted
    layout: Layout = "slots"
    device: str = "cpu"
    piece: int = PIECE
    context: int | None = None  # of caches that neither grow nor come in other sizes
    batch: int | None = None  # rows of a decode step at most

    def logits(
        self, input_ids: Ids, pixel_values: Pixels | None = None, *, lengths: Ids | None = None
    ) -> Any:
        """int64 [B, S] -> float32 [B, S, vocab]; no cache involved.

        Positions past a row's length hold no meaning.
        """
        ids, counts = read_ids(input_ids, lengths, self.spec.text.vocab)
        features = self._features(ids, counts, pixel_values)
        logits = torch.zeros(*ids.shape, self.spec.text.vocab)
        for rows, columns, out in self.walk(ids, counts, self._no_cache(ids), features):
            logits[rows, columns] = out["logits"]
        return _like(input_ids, logits)

    def trace(
        self, ids: Tensor, lengths: Tensor, names: Sequence[str], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Inner values `names` and logits of rows ids [B, S]: [own tokens, ...], row by row.

        The session's engine must have been opened with these names as taps.
        """
        own = torch.arange(ids.shape[1]) < lengths[:, None]
        found: dict[str, list[Tensor]] = {name: [] for name in (*names, "logits")}
        for rows, columns, out in self.walk(ids, lengths, self._no_cache(ids), features):
            out["logits"] = out["logits"].flatten(0, 1)
            for name, pieces in found.items():
                pieces.append(out[name].cpu()[own[rows, columns].flatten()])
        return {name: torch.cat(pieces) for name, pieces in found.items()}

    def _no_cache(self, ids: Tensor) -> Cache:
        """What one pass over ids [B, S] needs: buffers, or nothing."""
        capacity = ids.shape[1] if self.layout == "buffers" else 0
        return self._new_cache(len(ids), capacity)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of `capacity` positions; it grows if they get longer.

        An engine that was compiled for a context has caches of that size alone.

        Raises:
            MoecError: more rows or positions than the engine takes, or than the GPU has room for.
        """
        if self.batch is not None and batch > self.batch:  # the first decode step would be refused
            raise MoecError(
                f"{batch} rows", f"an engine for a batch of {self.batch}",
                f"{self.batch} or fewer", f"give it fewer at once, or build with --batch {batch}",
            )  # fmt: skip
        return self._new_cache(batch, capacity)

    def _new_cache(self, batch: int, capacity: int) -> Cache:
        if self.context is not None:
            self._check_context(capacity)
            capacity = self.context
        return new_cache(self.spec, self.precision, batch, capacity, self.layout, self.device)

    def _check_context(self, positions: int) -> None:
        if self.context is not None and positions > self.context:
            raise MoecError(
                f"{positions} positions", f"an engine for a context of {self.context}",
                f"{self.context} or fewer", f"build with --context {positions}",
            )  # fmt: skip

    def prefill(
        self,
        input_ids: Ids,
        pixel_values: Pixels | None = None,
        *,
        lengths: Ids | None = None,
        capacity: int | None = None,
    ) -> tuple[Tensor, Cache]:
        """Logits of each row's last token, float32 [B, vocab], and the cache after it.

        `capacity` is the number of positions to make room for; the cache grows past it if needed.
        """
        ids, counts = read_ids(input_ids, lengths, self.spec.text.vocab)
        features = self._features(ids, counts, pixel_values)
        cache = self.new_cache(len(ids), capacity or ids.shape[1])
        return self.extend(ids, counts, cache, features), cache

    def image_features(self, pixel_values: Pixels) -> Tensor:
        """float32 [tiles, channels, height, width] -> [tiles * tokens, dim] for the decoder.

        Raises:
            MoecError: the model has no vision tower, or these are no tiles for it.
        """
        return self._see(read_tiles(pixel_values, self.spec))

    @property
    def waits_for_nobody(self) -> bool:
        """Whether a decode step on tokens that lie on the GPU only starts the work there."""
        return self.engine in ("torch", "tensorrt") and self.device != "cpu"

    def decode(self, tokens: Ids, cache: Cache) -> Tensor:
        """One more token a row, int64 [B] -> its logits, float32 [B, vocab]; `cache` is updated.

        The logits lie on the session's device. Tokens that lie on the GPU, as those chosen from
        logits do, are taken as they are by engines "torch" and "tensorrt": nobody waits for the
        step, and nobody checks that they are in the vocabulary.
        """
        column = torch.as_tensor(tokens)[:, None]
        if not self.waits_for_nobody:
            column = column.cpu()
        return self.extend(column, torch.ones(len(column), dtype=torch.int64), cache)

    def extend(
        self, ids: Tensor, lengths: Tensor, cache: Cache, features: Tensor | None = None
    ) -> Tensor:
        """Append ids [B, S], of which each row owns its first `lengths`, in pieces.

        `features` [N, dim] stand for the rows' own image tokens, row by row. Returns the logits of
        each row's last own token, float32 [B, vocab]; rows of length 0 get zeros and keep their
        cache.
        """
        if not ids.is_cuda:
            check_ids(ids, self.spec.text.vocab)
        if ids.shape[1] == 1 and bool(lengths.all()):  # a decode step copies nothing
            ((_, _, out),) = self.walk(ids, lengths, cache, features, every=False)
            return out["logits"][:, 0]
        last = torch.zeros(len(ids), self.spec.text.vocab)
        for rows, columns, out in self.walk(ids, lengths, cache, features, every=False):
            ends = (lengths[rows] > columns.start) & (lengths[rows] <= columns.stop)
            last[rows][ends] = out["logits"].cpu()[ends, 0]
        return last

    def walk(
        self,
        ids: Tensor,
        lengths: Tensor,
        cache: Cache,
        features: Tensor | None = None,
        every: bool = True,
    ) -> Iterator[tuple[slice, slice, dict[str, Tensor]]]:
        """Run ids [B, S] call by call: rows, columns and what the graph returned for them.

        A call has logits for every token, or for the last own token of each row only.
        """
        width, chunk = ids.shape[1], self.spec.text.chunk
        needed = int((cache.lengths + lengths.clamp(min=1)).max())
        self._check_context(needed)
        if cache.capacity and needed > cache.capacity:
            grow(self.spec, cache, max(needed, 2 * cache.capacity))
        images = self._checked(features, ids, lengths)
        calls = (
            buffered_calls(cache.lengths, lengths, width, chunk, self.piece)
            if self.layout == "buffers"
            else padded_calls(width, self.piece if cache.capacity else width)
        )
        for rows, columns in calls:
            piece = ids[rows, columns]
            own = (lengths[rows] - columns.start).clamp(0, piece.shape[1])
            index = (
                torch.arange(piece.shape[1]).repeat(len(piece), 1)
                if every
                else (own - 1).clamp(min=0)[:, None]
            )
            fused = None if images is None else features_within(*images, rows, columns)
            out = self._step(piece, own, index, cache, rows, fused)
            if self.layout == "slots" and cache.capacity:
                for name in cache.tensors:
                    cache.tensors[name] = out[name.replace("past", "present", 1)]
            cache.lengths = cache.lengths.clone()
            cache.lengths[rows] += own
            yield rows, columns, out

    def generate(
        self,
        input_ids: Ids,
        pixel_values: Pixels | None = None,
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
        _check_settings(max_new_tokens, temperature, top_k, top_p, seed)
        ids, counts = read_ids(input_ids, lengths, self.spec.text.vocab)
        features = self._features(ids, counts, pixel_values)
        if max_new_tokens < 1:
            return _like(input_ids, ids)
        ends = set(self.spec.tokens.eos if stop is None else stop)
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        rows = [row[:n].tolist() for row, n in zip(ids, counts, strict=True)]
        alive = torch.ones(len(rows), dtype=torch.bool)
        capacity = int(counts.max()) + max_new_tokens - 1  # the last token is not fed
        cache = self.new_cache(len(ids), capacity)
        logits = self.extend(ids, counts, cache, features)
        for step in range(max_new_tokens):
            # The likeliest token is found where the logits are; draws are made on the CPU.
            given = logits.cpu() if temperature else logits
            tokens = sample(given, temperature, top_k, top_p, generator)
            arrived = on_host(tokens)
            # While the host looks whether a row has ended, the GPU goes on as if none had.
            ahead = self.waits_for_nobody and bool(alive.all()) and step + 1 < max_new_tokens
            if ahead:
                logits = self.decode(tokens, cache)
            tokens = arrived()
            new = [int(t) if on else None for t, on in zip(tokens, alive, strict=True)]
            for row, token in zip(rows, new, strict=True):
                row += [] if token is None else [token]
            if stream:
                stream(new)
            alive = torch.tensor([token is not None and token not in ends for token in new])
            if not alive.any() or step + 1 == max_new_tokens:
                break
            if not ahead:
                logits = self.extend(tokens[:, None], alive.long(), cache)
        longest = max(map(len, rows))
        pad = self.spec.tokens.padding
        return _like(input_ids, torch.tensor([row + [pad] * (longest - len(row)) for row in rows]))

    def _step(
        self,
        ids: Tensor,
        lengths: Tensor,
        logit_index: Tensor,
        cache: Cache,
        rows: slice,
        features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        feeds = {
            "input_ids": ids.contiguous(),
            "past_lengths": cache.lengths[rows],
            "lengths": lengths,
            "logit_index": logit_index,
            **cache.of(rows),
        }
        if self.layout == "buffers":
            feeds |= spans(self.spec.text.chunk, cache.lengths[rows], ids.shape[1])
        if features is not None:
            # The graph counts image tokens in padding too: put another token there.
            image = self.spec.tokens.image
            padding = (ids == image) & ~self.image_mask(ids, lengths)
            feeds["input_ids"] = ids.masked_fill(padding, int(image == 0))
            feeds["image_features"] = features
        return self.run(feeds)

    def image_mask(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The rows' own image tokens: bool [B, S]; none without a vision tower."""
        if self.spec.vision is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        own = torch.arange(ids.shape[1]) < lengths[:, None]
        return own & (ids == self.spec.tokens.image)

    def _features(self, ids: Tensor, lengths: Tensor, pixel_values: Pixels | None) -> Tensor | None:
        """Image features for the image tokens of `ids`, after a check that they fit."""
        if pixel_values is None:
            return None
        tiles = read_tiles(pixel_values, self.spec)
        assert self.spec.vision is not None
        each, counts = self.spec.vision.tokens, self.image_mask(ids, lengths).sum(1)
        if int(counts.sum()) != each * len(tiles) or bool((counts % each).any()):
            rows = f", by row {counts.tolist()}" if len(ids) > 1 else ""
            raise MoecError(
                "input_ids",
                f"{int(counts.sum())} image tokens (id {self.spec.tokens.image}) for {len(tiles)} "
                f"tiles of pixel_values{rows}",
                f"{each * len(tiles)}, which is {each} for each tile, and whole tiles in each row",
                "build both from one prompt and its images: moec.encode",
            )
        return self._see(tiles)

    def _see(self, tiles: Tensor) -> Tensor:
        assert self.vision is not None
        run = self.vision()
        options = self.artefact and self.artefact.manifest.options
        pieces = torch.split(tiles, min(TILES, options.tiles) if options else TILES)
        return torch.cat([run({"pixel_values": piece})["image_features"].cpu() for piece in pieces])

    def _checked(
        self, features: Tensor | None, ids: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """`features` in the graph's dtype, and the image tokens [B, S] that they stand for."""
        if features is None:
            return None
        images = self.image_mask(ids, lengths)
        expected = (int(images.sum()), self.spec.text.dim)
        if self.spec.vision is None or tuple(features.shape) != expected:
            raise MoecError(
                "features", f"{list(features.shape)}",
                f"{list(expected)}, one for each image token, and a model with a vision tower",
                "take them from Session.image_features",
            )  # fmt: skip
        return features.to(TORCH_DTYPES[self.precision]), images


def features_within(features: Tensor, images: Tensor, rows: slice, columns: slice) -> Tensor:
    """Of features [N, dim], one for each True of images [B, S], those of some rows and columns."""
    order = (images.flatten().cumsum(0) - 1).view_as(images)
    return features[order[rows, columns][images[rows, columns]]]


def open_session(
    path: str | Path, device: str = "cpu", engine: str | None = None, preset: str = "lean"
) -> Session:
    """Open an artefact (in its target's engine, or "eager") or a checkpoint folder ("eager").

    Args:
        device: "cpu"; "cuda" for artefacts of target torch, and of target ort in fp16 or bf16.
        engine: "onnxruntime" for targets onnx and ort, "torch" for target torch, "tensorrt" for
            targets tensorrt and tensorrt-rtx, whose ONNX an "interpreter" runs too; or "eager".
        preset: options of ONNX Runtime, "lean" (weights stay mapped) or "fast" (folded and
            prepacked).

    Raises:
        MoecError: no artefact, no weights, changed weights (exit code 2), or a device or package
            that is not there (3).
    """
    path = Path(path)
    for name, given, known in (
        ("device", device, ("cpu", "cuda")),
        ("engine", engine, (None, *ENGINES)),
        ("preset", preset, (*PRESETS, EXACT)),
    ):
        if given not in known:
            expected = " or ".join(filter(None, known))
            raise MoecError(f"{name} {given}", f"no such {name}", expected, "choose one of them")
    if device == "cuda" and engine in ("eager", "interpreter"):
        raise MoecError(
            "device cuda", f"engine {engine}", "another engine; this one runs on the cpu",
            "leave engine out", exit_code=3,
        )  # fmt: skip
    if not (path / NAME).is_file() and (path / "config.json").is_file():
        if engine not in (None, "eager"):
            raise MoecError(
                path, "a checkpoint", f"an artefact for engine {engine}",
                f"python cli.py build --checkpoint {path}",
            )  # fmt: skip
        spec, _, entries = read_model(path)
        return eager_session(spec, entries, "fp32")
    artefact = open_artefact(path)
    if engine == "eager":
        manifest = artefact.manifest
        return eager_session(manifest.spec, artefact.entries(), manifest.compute, artefact)
    own = artefact.manifest.engine
    able = (own, "interpreter") if own == "tensorrt" else (own,)
    if engine not in (None, *able):
        raise MoecError(
            f"engine {engine}: {path}", f"an artefact of target {artefact.manifest.target}",
            f"engine {' or '.join((*able, 'eager'))}", "leave engine out",
        )  # fmt: skip
    if engine == "interpreter":
        return interpreter_session(artefact)
    return artefact_session(artefact, device, preset)


def artefact_session(
    artefact: Artefact, device: str = "cpu", preset: str = "lean", taps: Sequence[str] = ()
) -> Session:
    """`artefact` in the engine of its target; `taps` as in `ort_session`, but for TensorRT."""
    if artefact.manifest.engine == "torch":
        return torch_session(artefact, device, taps)
    if artefact.manifest.engine == "tensorrt":
        return tensorrt_session(artefact, device)
    return ort_session(artefact, device, preset, taps)


def interpreter_session(artefact: Artefact, taps: Sequence[str] = ()) -> Session:
    """The ONNX of `artefact`, of a target of TensorRT, in ONNX's reference interpreter."""
    manifest, options = artefact.manifest, _options(artefact)
    run = interpreter(artefact, taps)
    vision = once(partial(interpreter, artefact, part="vision"))
    return Session(
        manifest.spec, "fp32", "interpreter", run, artefact, vision, "buffers",
        piece=options.piece, context=options.context,
    )  # fmt: skip


def tensorrt_session(artefact: Artefact, device: str = "cuda") -> Session:
    """`artefact` in TensorRT, on engines that were built for it."""
    manifest, options = artefact.manifest, _options(artefact)
    run = tensorrt_engine(artefact, device=device)
    vision = once(partial(tensorrt_engine, artefact, part="vision", device=device))
    return Session(
        manifest.spec, manifest.compute, "tensorrt", run, artefact, vision, "buffers", device,
        options.piece, options.context, options.batch,
    )  # fmt: skip


def _options(artefact: Artefact) -> EngineOptions:
    options = artefact.manifest.options
    if options is None:
        raise MoecError(
            f"{artefact.path / NAME}: options", "null", "the sizes that an engine is built for",
            "build the artefact again",
        )  # fmt: skip
    return options


def torch_session(
    artefact: Artefact,
    device: str = "cpu",
    taps: Sequence[str] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> Session:
    """`artefact`, of target torch, in torch; `weights` as in `torch_engine`."""
    manifest = artefact.manifest
    run = torch_engine(artefact, device, taps, weights=weights)
    vision = once(partial(torch_engine, artefact, device, part="vision"))
    return Session(
        manifest.spec, manifest.compute, "torch", run, artefact, vision, "buffers", device,
        LONG_PIECE if device == "cuda" else PIECE,
    )  # fmt: skip


def ort_session(
    artefact: Artefact, device: str = "cpu", preset: str = "lean", taps: Sequence[str] = ()
) -> Session:
    """`artefact` in ONNX Runtime; `taps` names inner values that `trace` will want."""
    manifest = artefact.manifest
    run = ort_engine(artefact, preset, taps, device=device)
    vision = once(partial(ort_engine, artefact, preset, part="vision", device=device))
    return Session(
        manifest.spec, manifest.compute, "onnxruntime", run, artefact, vision,
        "buffers" if manifest.buffered else "slots", device,
    )  # fmt: skip


def eager_session(
    spec: ModelSpec,
    entries: Mapping[str, Entry],
    precision: str,
    artefact: Artefact | None = None,
    taps: Sequence[str] = (),
    near: float | None = None,
) -> Session:
    """The eager reference on the weights `entries`; `taps` as in `ort_session`.

    `near` is as in `eager_engine`.
    """
    run = eager_engine(spec, entries, precision, taps, near=near)
    vision = once(partial(eager_engine, spec, entries, precision, part="vision"))
    return Session(spec, precision, "eager", run, artefact, vision)


def _check_settings(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    for name, given, good, expected in (
        ("max_new_tokens", max_new_tokens, isinstance(max_new_tokens, int), "an integer"),
        ("seed", seed, seed is None or 0 <= seed < 2**63, "0 to 2^63 - 1"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not good:
            raise MoecError(name, given, expected, f"correct --{name.replace('_', '-')}")


def _like(given: object, result: Tensor) -> Any:
    return result if isinstance(given, Tensor) else result.numpy()
