"""Llama 4: decoders of type `llama4_text`, and models with a vision tower of type `llama4`."""

from moec.spec.hf.architectures.common import Architecture
from moec.spec.hf.architectures.llama4.keys import KEYS
from moec.spec.hf.architectures.llama4.read import read
from moec.spec.hf.architectures.llama4.write import generation, write

LLAMA4 = Architecture(
    ("llama4", "llama4_text"),
    read,
    write,
    KEYS,
    separate_experts=False,
    generation=generation,
)
