"""W4A16 checkpoints of compressed-tensors, against what that library says that they mean."""

from pathlib import Path

import pytest
import torch

import moec
from moec.graph_builder.ops.int4 import dequantize_int4
from moec.spec.hf.names import keys
from moec.spec.names import scale_of, zero_point_of
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from moec.weights.view import view
from tests.int4_checkpoints import make
from tests.oracle import relative, transformers_logits
from tests.small import SMALL

pytestmark = pytest.mark.full

SPEC = SMALL.model_copy(
    update={"vision": None, "text": reduced(PRESETS["tiny-scout"], 1, block=128, head_dim=32).text}
)
SPEC = SPEC.model_copy(
    update={
        "text": SPEC.text.model_copy(
            update={
                "layers": 2, "attention": "LG", "rope": "RN", "qk_norm": "Q-",
                "temperature": "-T", "ffn": "DM",
                "experts": SPEC.text.experts.model_copy(update={"count": 3}),
            }
        )
    }
)  # fmt: skip

#: how a checkpoint is quantised
KINDS: dict[str, dict[str, object]] = {
    "32": {"group": 32},
    "64, zero points, float32": {"group": 64, "symmetric": False, "dtype": torch.float32},
    "128, zero points": {"group": 128, "symmetric": False},
    "rows, float16": {"group": None, "dtype": torch.float16},
    "128, experts' down projections wide": {"group": 128, "kept": ("experts.*down_proj",)},
    "attention alone": {"group": 128, "kept": ("feed_forward",)},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "wide"
    write_random_checkpoint(SPEC, folder, seed=4)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_means_what_the_library_says(kind: str, wide: Path, tmp_path: Path) -> None:
    folder, plain = tmp_path / "int4", tmp_path / "plain"
    means = make(wide, folder, plain, **KINDS[kind])  # type: ignore[arg-type]
    spec, _, entries = read_model(folder)
    assert spec.scheme and spec.scheme.int4
    ours = {key.removesuffix("_packed"): name for name, key in keys(spec).items()}
    seen = 0
    for key, expected in means.items():
        name = ours[key]
        if scale_of(name) in entries:
            parts = [view(entries[each]) for each in (name, scale_of(name))]
            zero = view(entries[zero_point_of(name)]) if spec.scheme.zero_points else None
            found = dequantize_int4(*parts, zero, spec.scheme.scales)
            assert found.dtype == expected.dtype and torch.equal(found, expected), key
            seen += 1
    assert seen >= 8
    rows = [torch.randint(0, SPEC.text.vocab, (n,)) for n in (21, 8)]
    wanted = transformers_logits(plain, rows)
    art = moec.export(folder, out=tmp_path / "art")
    assert art.manifest.weights.mode == "in-place" and not art.manifest.rewritten
    assert art.manifest.build.bytes_written < 2e6
    for session in (moec.open_session(folder), moec.open_session(art.path)):
        for row, want in zip(rows, wanted, strict=True):
            assert relative(session.logits(row[None])[0], want) < 1e-4
            cache = session.new_cache(1, 1)
            steps = [session.decode(token[None], cache)[0] for token in row]
            assert relative(torch.stack(steps), want) < 1e-4
