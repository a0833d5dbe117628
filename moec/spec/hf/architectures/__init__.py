"""The architectures whose checkpoints moec reads: one row each, by the name that a spec has."""

from moec.spec.hf.architectures.aria_text import ARIA_TEXT
from moec.spec.hf.architectures.common import Architecture
from moec.spec.hf.architectures.deepseek_moe import DEEPSEEK_MOE
from moec.spec.hf.architectures.deepseek_v3 import DEEPSEEK_V3
from moec.spec.hf.architectures.llama4 import LLAMA4
from moec.spec.hf.architectures.mixtral import MIXTRAL
from moec.spec.hf.architectures.olmoe import OLMOE
from moec.spec.hf.architectures.qwen3_moe import QWEN3_MOE

ARCHITECTURES: dict[str, Architecture] = {
    "llama4": LLAMA4,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "deepseek_moe": DEEPSEEK_MOE,
    "deepseek_v3": DEEPSEEK_V3,
    "aria_text": ARIA_TEXT,
}
