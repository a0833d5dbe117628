"""No file of a checkpoint folder may be a link to a file outside it; a download cache is inside."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.exporters.static_scales import SCALES, scales_for
from moec.runtime.inputs.text import open_text
from moec.spec.files import load_spec
from moec.spec.scheme import SCHEMES
from moec.weights.checkpoint import INDEX, Checkpoint, read_checkpoint
from moec.weights.trust import records
from tests.artefact.opening.test_weights_from import to_cache
from tests.refusals import refusal


def _scales(folder: Path) -> object:
    spec = load_spec(folder).model_copy(update={"scheme": SCHEMES["static"]})
    return scales_for(spec, "pack", None, folder)


def _find(name: str) -> Callable[[Path], object]:
    return lambda folder: open_text(folder).find(name)


def _companion(name: str) -> Callable[[Path], object]:
    return lambda folder: Checkpoint(folder, (), {}, folder.parent).companion(name)


#: what reads a file of the folder
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": load_spec,
    "generation_config.json": load_spec,
    "hf_quant_config.json": load_spec,
    INDEX: read_checkpoint,
    SCALES: _scales,
    "tokenizer.json": open_text,
    "tokenizer_config.json": open_text,
    "special_tokens_map.json": open_text,
    "chat_template.jinja": open_text,
    "chat_template.json": open_text,
    "processor_config.json": _find("processor_config.json"),
    "preprocessor_config.json": _find("preprocessor_config.json"),
}


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint in a folder of the user's, which is allowed and holds other things too."""
    records.allow_folder(tmp_path)
    (tmp_path / ".ssh").mkdir()
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    "read, place",
    [
        (read, place)
        for read in dict.fromkeys([*READERS.values(), _companion("tokenizer.json")])
        for place in (["beside", "below"] if read is load_spec else ["beside"])
    ],
)
def test_no_file_leads_out(folder: Path, read: Callable[[Path], object], place: str) -> None:
    """What is linked is a file that would do, so that the link alone is refused."""
    for name in [each for each, reader in READERS.items() if reader is read] or ["tokenizer.json"]:
        file = folder / name
        away = folder.parent / (f".ssh/{name}" if place == "below" else name)
        kept = file.read_bytes() if file.exists() else None
        away.write_bytes(kept or json.dumps({"chat_template": "x"}).encode())
        file.unlink(missing_ok=True)
        file.symlink_to(away)
        refusal(lambda: read(folder), name)
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)


def test_links_inside_and_a_download_cache_work(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("hello")
    (folder / "tokenizer.json").rename(folder / "other.json")
    (folder / "tokenizer.json").symlink_to("other.json")
    for each in (folder, to_cache(folder, tmp_path / "hub")):
        assert load_spec(each).tokens == load_spec(folder).tokens
        assert read_checkpoint(each).shards and _scales(each)
        assert open_text(each).templates == {"default": "hello"}
        assert _companion("tokenizer.json")(each)
