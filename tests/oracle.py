"""transformers as the oracle of random models, one row at a time and without padding."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
)

import moec
from moec.runtime.cache import new_cache
from moec.runtime.engines.eager import eager_engine
from moec.weights.checkpoint import read_checkpoint
from moec.weights.name_map import match


def transformers_logits(
    folder: Path, rows: Sequence[Tensor], tiles: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Logits of each row [S]; with `tiles`, those of its images [n, C, H, W], n may be 0."""
    kind = Llama4ForConditionalGeneration
    if tiles is None:
        plain = moec.load_spec(folder).architecture == "llama4"
        kind = Llama4ForCausalLM if plain else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for index, row in enumerate(rows):
            images = {"pixel_values": tiles[index]} if tiles and len(tiles[index]) else {}
            found.append(model(row[None], use_cache=False, **images).logits[0])
    return found


def routers_are_clear(
    folder: Path, rows: Sequence[Tensor], tiles: Sequence[Tensor] | None = None
) -> bool:
    """No router so near a tie that rounding decides: then the models may rightly differ."""
    spec = moec.load_spec(folder)
    text, entries = spec.text, match(spec, read_checkpoint(folder))
    names = [layer.ranked_by for layer in text.all_layers if layer.moe]
    if not names or text.experts.top_k == text.experts.count:
        return True
    run = eager_engine(spec, entries, taps=names)
    see = eager_engine(spec, entries, part="vision") if tiles else None
    for index, row in enumerate(rows):
        images = see({"pixel_values": tiles[index]}) if see and tiles and len(tiles[index]) else {}
        out = run(
            {
                "input_ids": row[None],
                "past_lengths": torch.zeros(1, dtype=torch.int64),
                "lengths": torch.tensor([len(row)]),
                "logit_index": torch.zeros(1, 1, dtype=torch.int64),
                **new_cache(spec, "fp32", 1, 0).tensors,
                **images,
            }
        )
        for name in names:
            best = out[name].topk(text.experts.top_k + 1).values
            if (best[:, -2] - best[:, -1]).min() < 1e-5:
                return False
    return True


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error over the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_rows_agree(
    session: moec.Session, rows: Sequence[Tensor], expected: Sequence[Tensor], limit: float = 1e-4
) -> None:
    """The logits of each row alone, in one call and token by token."""
    for row, want in zip(rows, expected, strict=True):
        assert relative(session.logits(row[None])[0], want) < limit
        cache = session.new_cache(1, 1)
        steps = [session.decode(token[None], cache)[0] for token in row]
        assert relative(torch.stack(steps), want) < limit
