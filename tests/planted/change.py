"""Measure how much a planted fault changes what an artefact computes: a fault changes something.

Two artefacts run on the same inputs, in ONNX Runtime: sequences of different lengths in one call,
the same through the caches and around the ring, positions far beyond both, images. A fault that
changes none of their outputs is no fault, and a proof that passes it is right.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

import moec
from moec.runtime.session import Session

#: lengths of the sequences of the first call, in chunks, and of the last positions
RAGGED, FAR, STEPS = (2.2, 1.35), 3.5, 6
GENAI = Path("genai") / "model.onnx"


def outputs(folder: Path, seed: int = 5) -> dict[str, Tensor]:
    """Logits and image features of the artefact at `folder` on fixed inputs, by what was run."""
    session = moec.open_session(folder)
    found = dict(_runs(session, torch.Generator().manual_seed(seed)))
    if (folder / GENAI).is_file():
        found["GenAI"] = _genai(folder, session)
    return found


def _runs(session: Session, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    text = session.spec.text
    chunk = text.chunk or 16
    lengths = torch.tensor([int(part * chunk) for part in RAGGED])

    def draw(*shape: int) -> Tensor:
        return torch.randint(6, text.vocab, shape, generator=generator)

    ids = draw(2, int(lengths.max()))
    own = torch.arange(ids.shape[1]) < lengths[:, None]
    yield "one call", session.logits(ids, lengths=lengths)[own]
    last, cache = session.prefill(ids, lengths=lengths)
    steps = [session.decode(draw(2), cache) for _ in range(STEPS)]
    yield "decode", torch.stack([last, *steps])
    # every token of the vocabulary, in rows as long as they fit: also far positions
    count = min(text.max_positions - STEPS, max(int(FAR * chunk), 512))
    every = torch.arange(-(-text.vocab // count) * count) % text.vocab
    if session.spec.tokens.image is not None:
        every[every == session.spec.tokens.image] = 0
    for row in every.view(-1, count):
        yield f"tokens from {int(row[0])}", session.logits(row[None])[0]
    if session.spec.vision:
        vision, image = session.spec.vision, session.spec.tokens.image
        shape = 2, vision.channels, vision.image, vision.image
        pixels = torch.rand(shape, generator=generator) * 2 - 1
        yield "image features", session.image_features(pixels)
        text_ids = draw(1, 2 * vision.tokens + 8)
        text_ids[0, 4 : 4 + 2 * vision.tokens] = image
        yield "images", session.logits(text_ids, pixels)[0]


def _genai(folder: Path, session: Session) -> Tensor:
    """The logits of the graph for ONNX Runtime's GenAI; weights lie in its own folder."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    graph = onnxruntime.InferenceSession(folder / GENAI, options)
    count = int(RAGGED[0] * (session.spec.text.chunk or 16))
    feeds = {}
    for port in graph.get_inputs():
        shape = [1 if size == "batch" else count if isinstance(size, str) else size
                 for size in port.shape]  # fmt: skip
        feeds[port.name] = np.zeros(shape, np.float32 if "float" in port.type else np.int64)
    feeds["input_ids"] += np.arange(count)[None] % (session.spec.text.vocab - 6) + 6
    feeds["attention_mask"] += 1
    return torch.from_numpy(graph.run(["logits"], feeds)[0])


def change(clean: dict[str, Tensor], faulty: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative change of an output, and in which run."""
    changes = {
        name: float((faulty[name] - out).abs().max() / out.abs().max())
        for name, out in clean.items()
    }
    worst = max(changes, key=lambda name: changes[name] if changes[name] == changes[name] else 9e9)
    return changes[worst], worst
