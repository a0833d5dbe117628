"""A session runs a model: it has an engine, makes caches for it, and generates tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.runtime import checked_calls
from moec.runtime.batching import Ends, buffered_calls, ends_of, logits_of, padded_calls
from moec.runtime.cache import Cache, grow, new_cache, room_for
from moec.runtime.conversation import Conversation
from moec.runtime.drafts import drafted_steps
from moec.runtime.engines.engine import Limits, Run
from moec.runtime.feeds import feeds
from moec.runtime.inputs.arrays import Arrays, Ids, Pixels, check_ids, like, read_ids, read_tiles
from moec.runtime.inputs.image_tokens import check_tiles, features_within, images_for
from moec.runtime.ranks.group import same_seed
from moec.runtime.sampling import Settings, chooser, ends
from moec.runtime.steps import undrafted_steps
from moec.runtime.tower import TILES, features_of
from moec.spec import names
from moec.spec.errors import clear_errors
from moec.spec.model import ModelSpec
from moec.spec.sharding import ALONE, Rank, local
from moec.weights.view import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class Session:
    """Run a model on batches of sequences.

    Token ids are integers, one sequence a row: a tensor or an array [B, S]. Sequences of different
    length are a list of lists, or a right-padded tensor with `lengths` [B]. Results are tensors if
    the ids were a tensor, else numpy arrays.

    Images are `pixel_values`, float32 [tiles, channels, height, width], in the order of the image
    tokens in the ids. Each tile has a fixed number of them, whose embeddings its image features
    replace. `moec.encode` makes both. Without images an image token is a token like any other.

    Only one thread at a time may use a session. A cache belongs to one continuation, because a call
    may write into it; for another continuation, clone its tensors.

    Attributes:
        spec: the model.
        precision: the dtype that the graph computes in: "fp32", "fp16" or "bf16".
        engine: the name of the engine.
        run: runs one call of the decoder.
        artefact: the artefact that was opened; None for a checkpoint.
        vision: opens the vision tower; it is called when the first image comes.
        mtp: opens the layer of multi-token prediction, if the artefact has it, as a session.
        limits: the layout of the caches, and the largest calls that the engine takes.
        device: "cpu" or "cuda".
        queues: whether a decode step on tokens on the GPU returns before the GPU has finished.
        checkpoint: the folder of the checkpoint that was opened, if no artefact was.
        rank: which of the processes that share the model this is.
        own: `spec` with the sizes that this process has, which its caches have too.
    """

    spec: ModelSpec
    precision: str
    engine: str
    run: Run
    artefact: Artefact | None = None
    vision: Callable[[], Run] | None = None
    mtp: "Callable[[], Session] | None" = None
    limits: Limits = field(default_factory=Limits)
    device: str = "cpu"
    queues: bool = False
    checkpoint: Path | None = None
    rank: Rank = ALONE
    own: ModelSpec = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", local(self.spec, self.rank))

    @overload
    def logits(
        self, input_ids: Tensor, pixel_values: Pixels | None = None, *, lengths: Ids | None = None
    ) -> Tensor: ...

    @overload
    def logits(
        self, input_ids: Arrays, pixel_values: Pixels | None = None, *, lengths: Ids | None = None
    ) -> NDArray[np.float32]: ...

    @clear_errors
    def logits(
        self, input_ids: Ids, pixel_values: Pixels | None = None, *, lengths: Ids | None = None
    ) -> Tensor | NDArray[np.float32]:
        """Run whole sequences without a cache: int64 [B, S] -> float32 [B, S, vocab].

        Args:
            input_ids: a tensor, an array or lists of token ids; the result is a tensor if this is.
            pixel_values: float32 [tiles, channels, height, width], for the image tokens.
            lengths: the tokens of each sequence, if they differ; logits past them mean nothing.

        Raises:
            MoecError: the token ids, lengths or image tiles do not fit the model.
        """
        ids, counts = read_ids(input_ids, lengths, self.spec.text.vocab)
        features = self._features(ids, counts, pixel_values)
        logits = torch.zeros(*ids.shape, self.spec.text.vocab)
        for rows, columns, out in self.walk(ids, counts, self._no_cache(ids), features):
            logits[rows, columns] = out["logits"]
        return like(input_ids, logits)

    def trace(
        self, ids: Tensor, lengths: Tensor, names: Sequence[str], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The logits and the inner values `names` of ids [B, S], without those of padding.

        Each value is [tokens, ...]: the tokens of the first sequence, then those of the next. The
        session must have been opened with these names as taps. `features` are as in `extend`.
        """
        own = torch.arange(ids.shape[1]) < lengths[:, None]
        found: dict[str, list[Tensor]] = {name: [] for name in (*names, "logits")}
        for rows, columns, out in self.walk(ids, lengths, self._no_cache(ids), features):
            out["logits"] = out["logits"].flatten(0, 1)
            for name, values in found.items():
                values.append(out[name].cpu()[own[rows, columns].flatten()])
        return {name: torch.cat(values) for name, values in found.items()}

    def _no_cache(self, ids: Tensor) -> Cache:
        """The cache for one pass over ids [B, S]: buffers if the engine needs them, else empty."""
        capacity = ids.shape[1] if self.limits.layout == "buffers" else 0
        return self._new_cache(len(ids), capacity)

    def new_cache(self, batch: int, capacity: int, prompt: int | None = None) -> Cache:
        """An empty cache for `batch` sequences of `capacity` tokens, with prompts of `prompt`.

        It grows when sequences get longer. An engine that was compiled has one size of caches.

        Raises:
            MoecError: the engine takes fewer sequences or tokens, or there is too little memory.
        """
        checked_calls.check_capacity(capacity, batch)
        checked_calls.check_batch(self.limits.batch, batch)
        return self._new_cache(batch, capacity, prompt)

    def _new_cache(self, batch: int, capacity: int, prompt: int | None = None) -> Cache:
        context = self.limits.context
        if context is not None:
            checked_calls.check_context(context, capacity)
            capacity, prompt = context, None
        return new_cache(
            self.own, self.precision, batch, capacity, self.limits.layout, self.device, prompt
        )

    def prefill(
        self,
        input_ids: Ids,
        pixel_values: Pixels | None = None,
        *,
        lengths: Ids | None = None,
        capacity: int | None = None,
    ) -> tuple[Tensor, Cache]:
        """The logits of each sequence's last token, float32 [B, vocab], and the cache after it.

        The cache has room for `capacity` tokens of each sequence, and grows if there are more.

        Raises:
            MoecError: the ids or images do not fit the model, or the engine takes fewer tokens.
        """
        ids, counts = read_ids(input_ids, lengths, self.spec.text.vocab)
        features = self._features(ids, counts, pixel_values)
        cache = self.new_cache(len(ids), capacity or ids.shape[1])
        return self.extend(ids, counts, cache, features), cache

    def image_features(self, pixel_values: Pixels) -> Tensor:
        """Run the vision tower: float32 [tiles, channels, height, width] -> [tokens, dim].

        Raises:
            MoecError: the model has no vision tower, or tiles of another shape.
        """
        return self._see(read_tiles(pixel_values, self.spec))

    def decode(self, tokens: Ids, cache: Cache) -> Tensor:
        """Append one token to each sequence, int64 [B]; return its logits, float32 [B, vocab].

        `cache` is updated. The logits are on the session's device. If the tokens are on a GPU,
        engines "torch" and "tensorrt" neither wait for the step nor check the tokens.
        """
        column = self._column(tokens)
        return self.extend(column, torch.ones(len(column), dtype=torch.int64), cache)

    def likeliest(self, tokens: Ids, cache: Cache) -> Tensor:
        """Append one token to each sequence, int64 [B]; return the likeliest next ones, int64 [B].

        That is what `decode` and `argmax` give, but no logits leave the engine if it can choose.
        """
        if not self.limits.greedy:
            return self.decode(tokens, cache).argmax(-1)
        column = self._column(tokens)
        count = torch.ones(len(column), dtype=torch.int64)
        self._check(column, count, cache)
        ((_, _, out),) = self.walk(column, count, cache, every=False, greedy=True)
        return out[names.BEST][:, 0]

    def _column(self, tokens: Ids) -> Tensor:
        column = checked_calls.read_column(tokens)
        return column if self.queues else column.cpu()

    def _check(self, ids: Tensor, lengths: Tensor, cache: Cache) -> None:
        checked_calls.check_call(self.own, self.precision, self.limits.layout, ids, lengths, cache)
        if not ids.is_cuda:
            check_ids(ids, self.spec.text.vocab)

    def extend(
        self, ids: Tensor, lengths: Tensor, cache: Cache, features: Tensor | None = None
    ) -> Tensor:
        """Append ids [B, S] to the sequences in `cache`, in prefill chunks.

        The first `lengths` [B] ids of a row are tokens; the others are padding. `features` [N, dim]
        are the features of the image tokens, those of the first sequence first. Returns the logits
        of each sequence's last token, float32 [B, vocab], zeros for a sequence of length 0.

        Raises:
            MoecError: ids, lengths and cache do not fit each other, or the session.
        """
        self._check(ids, lengths, cache)
        if ids.shape[1] == 1 and bool(lengths.all()):  # a decode step copies nothing
            ((_, _, out),) = self.walk(ids, lengths, cache, features, every=False)
            return out["logits"][:, 0]
        found: list[Ends] = []
        for rows, columns, out in self.walk(ids, lengths, cache, features, every=False):
            ends_of((rows, columns), lengths, out["logits"], found)
        return logits_of(found, len(ids), self.spec.text.vocab)

    def walk(
        self,
        ids: Tensor,
        lengths: Tensor,
        cache: Cache,
        features: Tensor | None = None,
        every: bool = True,
        greedy: bool = False,
        hidden: Tensor | None = None,
    ) -> Iterator[tuple[slice, slice, dict[str, Tensor]]]:
        """Run ids [B, S] in calls of at most a prefill chunk; yield each call's results.

        Yields the rows and the columns of the call, and the outputs of the graph by name. Logits
        are those of every token if `every`, else those of each row's last token in the call; with
        `greedy` there are the likeliest tokens instead. `hidden` [B, S, dim] is for the layer of
        multi-token prediction alone.
        """
        width, chunk = ids.shape[1], self.spec.text.chunk
        needed = room_for(cache, lengths, width, self.limits.layout)
        checked_calls.check_context(self.limits.context, needed)
        if cache.capacity and needed > cache.capacity:
            grow(self.own, cache, needed, self.limits.layout)
        if features is not None:
            images = images_for(self.spec, ids, lengths, features)
            features = features.to(TORCH_DTYPES[self.precision])
        if self.limits.layout == "buffers":
            calls = buffered_calls(cache.lengths, lengths, width, chunk, self.limits.prefill_chunk)
        else:
            most = self.limits.prefill_chunk if cache.capacity else None
            calls = padded_calls(width, most, len(ids))
        for rows, columns in calls:
            tokens = ids[rows, columns]
            own = (lengths[rows] - columns.start).clamp(0, tokens.shape[1])
            index = (
                torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
                if every
                else (own - 1).clamp(min=0)[:, None]
            )
            here = None if features is None else features_within(features, images, rows, columns)
            given = feeds(self.spec, self.limits.layout, tokens, own, index, cache, rows, here)
            if greedy:
                given[names.GREEDY] = torch.empty(0)
            if hidden is not None:
                given[names.HIDDEN] = hidden[rows, columns]
            out = self.run(given)
            if self.limits.layout == "slots" and cache.capacity:
                for name in cache.tensors:
                    cache.tensors[name] = out[names.present_of(name)]
            cache.lengths = cache.lengths.clone()
            cache.lengths[rows] += own
            yield rows, columns, out

    @overload
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Pixels | None = None,
        max_new_tokens: int = 64,
        **settings: Unpack[Settings],
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Arrays,
        pixel_values: Pixels | None = None,
        max_new_tokens: int = 64,
        **settings: Unpack[Settings],
    ) -> NDArray[np.int64]: ...

    def generate(
        self,
        input_ids: Ids,
        pixel_values: Pixels | None = None,
        max_new_tokens: int = 64,
        *,
        lengths: Ids | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[int] | None = None,
        stream: Callable[[list[int | None]], None] | None = None,
        mtp: bool = False,
    ) -> Tensor | NDArray[np.int64]:
        """Continue each sequence: int64 [B, S] -> int64 [B, S + new tokens], prompt included.

        Sequences that end early are padded on the right.

        Args:
            input_ids: the prompts, as in `logits`.
            pixel_values: the prompts' image tiles, as in `logits`.
            max_new_tokens: the most tokens to add to each sequence.
            lengths: the tokens of each sequence, if they differ.
            temperature: the sampling temperature; 0 takes the likeliest token (greedy). Default:
                what generation_config.json asks for, with its limits if you give none; else 0.
            top_k: sample from the k likeliest tokens only.
            top_p: sample from the likeliest tokens that reach this probability only.
            seed: the seed of the sampling.
            repetition_penalty: tokens that a sequence has already become less likely by this
                factor; 1 changes nothing. Default: what generation_config.json asks for.
            stop: tokens that end a sequence; default the model's own.
            stream: called after each step with its tokens, None for sequences that get none.
            mtp: whether the layer of multi-token prediction drafts tokens. They are the same but
                for rounding: the decoder runs two in a call.

        Raises:
            MoecError: an argument does not fit the model, or the engine was built for fewer tokens.
        """
        asked = (temperature, top_k, top_p, same_seed(seed, self.rank), repetition_penalty)
        choose_after = chooser(self.spec, max_new_tokens, *asked)
        ids, counts = read_ids(input_ids, lengths, self.spec.text.vocab)
        features = self._features(ids, counts, pixel_values)
        if max_new_tokens < 1:
            return like(input_ids, ids)
        ending = ends(stop, self.spec.tokens.eos)
        rows = [row[:n].tolist() for row, n in zip(ids, counts, strict=True)]
        made = drafted_steps if mtp else undrafted_steps
        for new in made(self, ids, counts, features, max_new_tokens, choose_after(rows), ending):
            for row, token in zip(rows, new, strict=True):
                row += [] if token is None else [token]
            if stream:
                stream(new)
        longest = max(map(len, rows))
        pad = self.spec.tokens.padding
        return like(input_ids, torch.tensor([row + [pad] * (longest - len(row)) for row in rows]))

    def close(self) -> None:
        """End the processes of a session on several GPUs; any other session has none."""

    def conversation(
        self, *, system: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Conversation:
        """Start a conversation, whose turns share one cache: `conversation().say("Hello").text`.

        Args:
            system: the system's message, which comes first.
            tools: the tools that the model may call, in the form that the chat template takes.

        Raises:
            MoecError: there is no tokenizer, or it is broken.
        """
        return Conversation(self, system=system, tools=tools)

    def _features(self, ids: Tensor, lengths: Tensor, pixel_values: Pixels | None) -> Tensor | None:
        """The image features of `pixel_values`, after a check that `ids` have a place for each."""
        if pixel_values is None:
            return None
        tiles = read_tiles(pixel_values, self.spec)
        check_tiles(self.spec, ids, lengths, tiles)
        return self._see(tiles)

    def _see(self, tiles: Tensor) -> Tensor:
        assert self.vision is not None
        options = self.artefact and self.artefact.manifest.options
        return features_of(self.vision(), tiles, options.tiles if options else TILES)
