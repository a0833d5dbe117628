"""Random models, both engines, against Hugging Face transformers in float32.

transformers runs each row alone and without padding: under left padding it shifts the query
temperature (docs/numerics.md).
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.oracle import relative, routers_are_clear, transformers_logits
from tests.parity import RELATIVE, check_pieces, check_prefill, sessions
from tests.strategies import specs

pytestmark = pytest.mark.full

MAVERICK = reduced(PRESETS["maverick"])
MAVERICK = MAVERICK.model_copy(
    update={"vision": None, "text": MAVERICK.text.model_copy(update={"layers": 8})}
)
#: a text model without experts, whose embedding is its head, and whose layers all have RoPE
DENSE = ModelSpec.model_validate(
    MAVERICK.model_dump()
    | {
        "name": "dense",
        "text": MAVERICK.text.model_dump()
        | {"ffn": "D", "rope": "R", "qk_norm": "Q", "temperature": "-", "tie_embeddings": True},
    }
)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spec=specs(),
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 34), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 33), max_size=4),
)
@example(spec=MAVERICK, seed=1, lengths=[33, 9, 20], cuts=[7, 8, 9, 25])
@example(spec=DENSE, seed=1, lengths=[33, 9, 20], cuts=[7, 8, 9, 25])
def test_random_models_agree(
    spec: ModelSpec, seed: int, lengths: list[int], cuts: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(spec, folder / "weights", seed)
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(0, spec.text.vocab, (n,), generator=generator) for n in lengths]
        assume(routers_are_clear(folder / "weights", rows))
        expected = transformers_logits(folder / "weights", rows)
        for session in sessions(folder):
            check_prefill(session, rows, expected)
            check_pieces(session, rows, expected, cuts)


@pytest.mark.parametrize("preset", ["scout", pytest.param("maverick", marks=pytest.mark.slow)])
def test_token_by_token_across_three_chunk_borders(preset: str, tmp_path: Path) -> None:
    spec = reduced(PRESETS[preset])
    spec = spec.model_copy(
        update={"vision": None, "text": spec.text.model_copy(update={"layers": 8})}
    )
    write_random_checkpoint(spec, tmp_path / "weights", seed=3)
    chunk = spec.text.chunk or 0
    rows = [torch.randint(0, 256, (n,)) for n in (3 * chunk + 5, 2)]
    expected = transformers_logits(tmp_path / "weights", rows[:1])[0]
    for session in sessions(tmp_path):
        cache = session.new_cache(1, 1)
        steps = [session.decode(token[None], cache)[0] for token in rows[0]]
        assert relative(torch.stack(steps), expected) < RELATIVE
