"""Images, tokenizers, templates and token files that would take all memory or time are refused."""

import io
import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models

import moec
from moec.runtime.inputs.chat import guarded
from moec.runtime.inputs.image import read_image
from moec.runtime.inputs.prompt import filled
from moec.runtime.inputs.template import fill
from moec.runtime.inputs.text import open_text
from moec.runtime.inputs.tiling import Tiling, tile
from moec.runtime.inputs.token_file import read_rows
from tests.refusals import refusal, within_a_gigabyte

pytestmark = pytest.mark.full

# ---------------------------------------------------------------- images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int = 1, colour: int = 0, *more: bytes) -> bytes:
    packer = zlib.compressobj(9)
    row = bytes(1 + (width * bits * (3 if colour == 2 else 1) + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_bomb(size: int) -> bytes:
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    return chunk(b"zTXt", b"k\0\0" + data)


def tags(count: int, size: int) -> bytes:
    """A small TIFF file with `count` tags, each of which has the same `size` bytes."""
    data = bytes(size)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", count)
    at = 8 + 2 + 12 * count + 4
    rows = b"".join(struct.pack("<HHII", 40_000 + i, 7, size, at) for i in range(count))
    return head + rows + bytes(4) + data


#: what is wrong -> (a small file, what the message must name)
IMAGES: dict[str, tuple[bytes, str]] = {
    "400 megapixels": (png(20_000, 20_000), "limit of 67108864 pixels"),
    "177 megapixels": (png(13_300, 13_300), "limit of 67108864 pixels"),
    "one row of 170 megapixels": (png(170_000_000, 1), "limit of 67108864 pixels"),
    "a gigabyte of text": (png(8, 8, 1, 0, text_bomb(1 << 30)), "does not decode"),
    "the same bytes in many tags": (tags(20_000, 1 << 20), ""),
}


@pytest.mark.parametrize("case", IMAGES)
def test_a_small_image_that_decodes_to_gigabytes_is_refused(case: str) -> None:
    data, names = IMAGES[case]
    with within_a_gigabyte():
        refusal(lambda: read_image(data), names)


def test_large_photos_and_many_frames_are_read() -> None:
    with within_a_gigabyte():
        assert read_image(png(8660, 5774, 8, 2)).size == (8660, 5774)  # 50 megapixels
        assert read_image(png(1, 1_000_000)).size == (1, 1_000_000)
    out = io.BytesIO()
    frames = [Image.new("L", (8, 8), i % 255) for i in range(500)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert read_image(out.getvalue()).size == (8, 8)


def test_tiles_of_gigabytes_are_refused() -> None:
    tiling = Tiling(4096, most=1024, fill_canvas=True)
    with within_a_gigabyte():
        refusal(lambda: tile(Image.new("RGB", (64, 64)), tiling), "tiles of 4096 x 4096")


# ---------------------------------------------------------------- templates

#: chat templates that do not end, or that fill the memory
TEMPLATES = {
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "a long text": "{{ 'x' * 10 ** 10 }}",
    "a long list": "{{ ([0] * 10 ** 10) | length }}",
    "a wide column": "{{ 'x' | center(10 ** 10) }}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "a wide field": "{{ '{:10000000000}'.format(1) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a macro of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a text that doubles": "{% set n = namespace(t='xx') %}{% for i in range(60) %}"
    "{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "much text": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "an indent": "{{ ('x\n' * 10 ** 6) | indent(10 ** 5) }}",
    "a join": "{{ range(99999) | join('x' * 10 ** 6) }}",
    "brackets": "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
    "an error of Python": "{{ [][0] + 1 / 0 }}{{ 1 / 0 }}",
    "a private name": "{{ ().__class__.__base__.__subclasses__() }}",
    "a lone surrogate": "{{ '\\ud800' }}",
}


HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case in ("a power", "an indent") else case
        for case in TEMPLATES
    ],
)
def test_a_template_without_end_is_refused(case: str) -> None:
    with within_a_gigabyte():
        refusal(lambda: fill(TEMPLATES[case], HELLO), "--chat")


@pytest.mark.usefixtures("impatient")
def test_a_template_of_one_message_is_filled_after_others_broke() -> None:
    refusal(lambda: fill("{{ 9 ** (9 ** 9) }}", HELLO), "--chat")
    template = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}é{% endfor %}"
    assert fill(template, HELLO) == "<user>helloé"


# ---------------------------------------------------------------- tokenizers


def _words(**changes: Any) -> bytes:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[unk]": 1}, unk_token="[unk]"))
    return json.dumps(json.loads(tokenizer.to_str()) | changes).encode()


def _doubling(count: int) -> dict[str, Any]:
    each = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [each] * count}


def _nested(count: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "NFC"}
    for _ in range(count):
        value = {"type": "Sequence", "normalizers": [value]}
    return value


def _special(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 2, "content": text, "special": True, **flags}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


#: tokenizer.json files that abort the process that loads them, or that encodes with them
TOKENIZERS: dict[str, bytes] = {
    "normalizers in normalizers": _words(normalizer=_nested(200)),
    "a text that doubles": _words(normalizer=_doubling(45)),
    "an expression in expressions": _words(pre_tokenizer=_split("(" * 5000 + ")" * 5000)),
    "a broken expression": _words(pre_tokenizer=_split("(a")),
    "lists in lists": b"[" * 10**6,
    "a vocabulary of one id": _words(
        model={"type": "BPE", "vocab": {"a": 2**40}, "merges": [["a", "b"]]}
    ),
    "special tokens without end": _words(added_tokens=[_special("<" + "ab" * (1 << 17) + ">")]),
    "no tokenizer": b"{}",
    "nothing": b"",
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_aborts_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZERS[case])
    with within_a_gigabyte():
        refusal(lambda: _use(tmp_path), "tokenizer.json")


def _use(folder: Path) -> None:
    words = open_text(folder)
    words.encode("a" * 100)
    words.tokenizer.special()


@pytest.mark.usefixtures("impatient")
def test_special_tokens_that_start_alike_end_a_prompt(tmp_path: Path) -> None:
    """To look for them in a long text takes their number times its length."""
    stems = ("aaaaaa", "baaaaa")
    tokens = [_special(f"{stems[i % 2]}{i}") | {"id": i + 2} for i in range(5000)]
    words = _words(added_tokens=tokens, normalizer={"type": "NFC"})
    (tmp_path / "tokenizer.json").write_bytes(words)
    (tmp_path / "chat_template.jinja").write_text("{{ 'a' * 500000 }}")

    def encode() -> None:
        text, ids = filled(open_text(tmp_path), HELLO, None)
        ids(text)

    with within_a_gigabyte():
        refusal(encode, "encode the text")


def test_a_long_special_token_takes_little_memory() -> None:
    token = "<" + "ab" * 60_000 + ">"
    with within_a_gigabyte():
        found, marker = guarded(HELLO, [token])
    assert found == HELLO and not marker
    (broken,), marker = guarded([{"role": "user", "content": f"{token} <ab"}], [token])
    assert broken["content"] == f"<{marker}{token[1:]} <a{marker}b"


def test_a_sound_tokenizer_gives_the_library_its_own_ids() -> None:
    tiny = Path(__file__).parents[3] / "examples" / "tiny-scout"
    own, text = Tokenizer.from_file(str(tiny / "tokenizer.json")), open_text(tiny)
    prompt = "def main(argv=None):\n    é \U0001d518 <|image|>"
    assert text.encode(prompt) == own.encode(prompt).ids
    assert text.has("<|image_start|>") and not text.has("no such token")
    streams = [text.stream(), text.stream()]
    shown = ["", ""]
    for stream in streams:
        next(stream)
    for token in own.encode(prompt).ids:
        for i, stream in enumerate(streams):  # two streams at once do not mix
            shown[i] += stream.send(token)  # type: ignore[attr-defined]
    assert shown[0] == shown[1] == own.decode(own.encode(prompt).ids)
    refusal(lambda: text.encode("\ud800"), "prompt")


# ---------------------------------------------------------------- token files


def _npy(shape: str, descr: str = "<i4", data: bytes = bytes(64)) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    head = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


NPY = {
    "a huge shape": _npy("(1000000000000,)"),
    "a shape beyond 64 bits": _npy(f"({2**64}, {2**64})"),
    "a negative size": _npy("(-1,)"),
    "pickles": _npy("(1,)", "|O"),
    "texts": _npy("(1,)", "<U8"),
    "three axes": _npy("(1, 1, 1)"),
    "a size that is text": _npy("('a',)"),
    "a header that is no literal": _npy("(1,", "<i4"),
    "structures": _npy("(1,)").replace(b"'<i4'", b"[('a','<i4')]"),
}


@pytest.mark.parametrize("case", NPY)
def test_a_token_file_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "rows.npy").write_bytes(NPY[case])
    spec = moec.load_spec("tiny-scout")
    with within_a_gigabyte():
        refusal(lambda: read_rows(tmp_path / "rows.npy", spec, tmp_path), "rows.npy")


def test_columns_first_and_other_byte_orders_are_read(tmp_path: Path) -> None:
    spec, rows = moec.load_spec("tiny-scout"), np.arange(12).reshape(3, 4)
    for array in (np.asfortranarray(rows), rows.astype(">i2"), rows.astype(np.uint8)):
        np.save(tmp_path / "rows.npy", array)
        assert read_rows(tmp_path / "rows.npy", spec, tmp_path).tolist() == rows.tolist()


@pytest.mark.slow
def test_ten_seconds_are_enough_for_any_refusal() -> None:
    """The limit is processor time, so that a busy machine refuses nothing that it should read."""
    before = time.process_time()
    refusal(lambda: fill(TEMPLATES["a loop"], HELLO), "8 s")
    assert time.process_time() - before < 10
