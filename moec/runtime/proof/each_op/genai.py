"""Compare the graph that onnxruntime-genai runs, op by op, in calls as genai makes them."""

from collections.abc import Iterator

import torch

from moec.exporters.onnx.write import GENAI
from moec.runtime.proof.each_op.table import checks_of
from moec.runtime.proof.each_op.watch import watch
from moec.runtime.proof.report import Check
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.spec import names
from moec.weights.view import TORCH_DTYPES

#: the most tokens of a prefill call
MOST = 140


def genai(tested: ArtefactUnderTest, most: float, generator: torch.Generator) -> Iterator[Check]:
    """Compare a prefill past a chunk border and some decode steps; `most` is the largest limit.

    There are two runs: sequences of one length, and sequences of different length, whose padding is
    in the buffers too.
    """
    spec = tested.artefact.manifest.spec
    text = spec.text
    dtype = TORCH_DTYPES[tested.compute]
    seen = watch(tested, "model", GENAI)
    engine = tested.open(GENAI, seen.taps)
    count = min(MOST, (text.chunk or 16) + 3)
    for shorter in (0, count // 3):
        lengths = torch.tensor([count, count - shorter])
        shape = (2, text.kv_heads, count + 4, text.head_dim)
        caches = {
            names.past(layer.index, kind): torch.zeros(shape, dtype=dtype)
            for layer in text.all_layers
            for kind in names.CACHED
        }
        own = torch.arange(count) < lengths[:, None]
        past, mask, width = torch.zeros(2, dtype=torch.int64), own.long(), count
        for _ in range(3):
            ids = torch.randint(0, text.vocab, (2, width), generator=generator)
            before = {name: each.clone() for name, each in caches.items()}
            out = engine({names.INPUT_IDS: ids, names.ATTENTION_MASK: mask, **caches})
            new = lengths if width > 1 else torch.ones(2, dtype=torch.int64)
            feeds = {
                names.INPUT_IDS: ids,
                names.PAST_LENGTHS: past,
                names.LENGTHS: new,
                names.LOGIT_INDEX: torch.arange(width).repeat(2, 1),
            }
            kept = {
                name: each
                for name, each in out.items()
                if not (names.is_present(name) and shorter)  # padding is in these
            }
            seen.compare(feeds | before, kept, {})
            past, width = past + new, 1
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    yield from checks_of(seen.found.values(), most, prefix=f"{GENAI}, ")
