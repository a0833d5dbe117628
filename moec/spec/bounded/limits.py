"""How much of what comes from outside moec accepts: one table of limits.

A checkpoint, an artefact, a spec, a tokenizer or an image may come from a stranger. moec checks
these limits before it allocates memory or starts a loop. Every limit is far above every model,
image and prompt that is known, so that only damaged or hostile files meet one.
"""

from typing import NamedTuple

MIB = 1 << 20
#: bytes of memory that a process may use while it reads one file
MEMORY = 1 << 30
#: seconds of processor time that one decoder, template, tokenizer or expression may take
SECONDS = 8


class Text(NamedTuple):
    """Limits of a text file.

    `bytes` is its size, `items` counts values of JSON or nodes of YAML (with what aliases repeat),
    and `depth` counts how far lists and objects are nested.
    """

    bytes: int
    items: int
    depth: int = 64


#: config.json, indices, headers, manifests, scales: the largest known are 8 MB
JSON = Text(32 * MIB, 2_000_000)
#: token ids as JSON
TOKENS_JSON = Text(64 * MIB, 8_000_000)
#: the largest known tokenizer.json has 33 MB and a million items
TOKENIZER = Text(96 * MIB, 8_000_000)
#: specs and schemes as YAML, which is read a hundred times more slowly than JSON
YAML = Text(4 * MIB, 100_000)
#: digits of an integer in a file
DIGITS = 1000

#: bytes of other files
TEMPLATE = 1 * MIB
TOKENS_TEXT = 64 * MIB
TOKENS_NPY = 256 * MIB
#: token ids in one file
TOKENS = 1 << 25
IMAGE_FILE = 256 * MIB
#: all files of an artefact but weights and engines; one with 3,072 separate experts has 60 MB
ARTEFACT = 512 * MIB
#: bytes of a model card
CARD = 1 * MIB
#: characters of all special tokens of a tokenizer together; Llama 4's have 28,000
SPECIAL = 1 << 18
#: characters of a text that a chat template makes
RENDERED = 16 * MIB

#: pixels of an image; cameras of 50 megapixels are common
PIXELS = 1 << 26
#: pixels of all tiles that one image is cut into; released models use 1.9 million
CANVAS = 1 << 25

#: axes of a tensor, and the largest of its sizes and offsets
AXES = 16
SIZE = 1 << 62

#: sizes of a model; Behemoth, the largest announced, has 2 T parameters
LAYERS = 512
WIDTH = 1 << 20
HEADS = 1 << 14
HEAD_DIM = 1 << 14
VOCAB = 1 << 24
POSITIONS = 2**31 - 1
EXPERTS = 1 << 12
#: experts of all MoE layers together, because some formats give each of them its own tensors
ALL_EXPERTS = 1 << 16
#: an image tile: pixels along a side, patches along a side, channels
TILE = 1 << 12
PATCHES = 1 << 8
CHANNELS = 1 << 6
#: angles of the 2D RoPE of one tile: patches times the width of a head; Llama 4 has 50,688
ROTATIONS = 1 << 24

#: characters of a name, and of a pattern over names
NAME = 1 << 12
PATTERN = 1 << 9
#: scheme rules; patterns with wildcards in all of them; expressions that a quantisation config
#: lists; and pairs of a name and an expression
RULES = 1 << 10
WILDCARDS = 1 << 10
LISTED = 20_000
MATCHES = 20_000_000
