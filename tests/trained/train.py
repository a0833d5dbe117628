"""Train the small models of this folder again: `python -m tests.trained.train NAME FOLDER`.

The text is the Python files of CPython's standard library of the Python that runs this (PSF
licence; 3.11 made the models that lie here), in the tokens of examples/tiny-scout. A fifth of its
files is held out. It takes some minutes on one core.
"""

import random
import sys
import sysconfig
import time
from pathlib import Path

import torch

from moec.runtime.bench.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()  # before transformers is imported

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    OlmoeConfig,
)

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny-scout"
LENGTH, ROWS, SECONDS = 256, 8, 300.0
SHARED = {
    "vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 5,
}  # fmt: skip
CONFIGS = {
    "tiny-olmoe": OlmoeConfig(
        **SHARED, intermediate_size=64, num_key_value_heads=4, num_experts=8,
        num_experts_per_tok=3,
    ),
    "tiny-deepseek-v3": DeepseekV3Config(
        **SHARED, intermediate_size=128, moe_intermediate_size=64, num_key_value_heads=4,
        n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=1,
        first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=24,
    ),
}  # fmt: skip


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the text for training and held out, each [rows, LENGTH + 1]."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    cut = len(files) // 5
    found = []
    for part in (files[cut:], files[:cut]):
        text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in part)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        found.append(ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1))
    return found[0], found[1]


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    own, held = windows()
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for key, bias in model.named_buffers():
        if "correction_bias" in key:
            bias.copy_(torch.randn(bias.shape) / 10 - 0.2)  # fixed, some of it negative
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / SECONDS) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 50) * (1 - done) + 1e-5
        rows = own[torch.randint(len(own), (ROWS,))]
        loss = model(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(loss, rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(step, f"{done:.2f}", f"{loss.item():.3f}", flush=True)
    model.bfloat16().save_pretrained(out)
    model = model.float().eval()
    with torch.inference_mode():
        logits = model(input_ids=held[:16, :-1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, held[:16, 1:].flatten())
    print(f"{step} steps; perplexity {loss.exp().item():.4f} over 16 windows that were held out")


if __name__ == "__main__":
    main()
