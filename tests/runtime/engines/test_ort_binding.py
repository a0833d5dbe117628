"""What a bound session keeps: nothing of a cache that is gone."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

import moec

pytest.importorskip("onnxruntime")


def test_a_cache_that_is_dropped_is_free(tiny_ort: Path) -> None:
    session = moec.open_session(tiny_ort)
    logits, cache = session.prefill(torch.randint(0, 4096, (1, 9)), capacity=30)
    session.decode(logits.argmax(-1), cache)
    held = [weakref.ref(each) for each in cache.tensors.values()]
    del cache
    gc.collect()
    assert held and not any(each() is not None for each in held)


def test_two_caches_in_turn_are_each_alone(tiny_ort: Path) -> None:
    """A cache at another place is bound anew, and one at the same place is not mistaken."""
    session = moec.open_session(tiny_ort)
    prompts, steps = torch.randint(0, 4096, (2, 1, 9)), torch.randint(0, 4096, (5, 1))
    alone = []
    for prompt in prompts:
        _, cache = session.prefill(prompt, capacity=30)
        alone.append([session.decode(token, cache) for token in steps])
    caches = [session.prefill(prompt, capacity=30)[1] for prompt in prompts]
    for i, token in enumerate(steps):
        for cache, expected in zip(caches, alone, strict=True):
            assert torch.equal(session.decode(token, cache), expected[i])
