"""Train the small models of this folder: `python -m tests.trained.train NAME FOLDER [SECONDS]`.

The text is the Python files of CPython's standard library of the Python that runs this (PSF
licence; 3.11 made the models that lie here), in the tokens of examples/tiny-scout. Files of which
a window of `eval_ids` in its golden values shows a part are held out. It takes some minutes on one
core. Experts are kept busy as each family does it: OLMoE by a loss, DeepSeek-V3 by its bias. On a
GPU, where other engines want heads of 128, a test trains `llama4-heads-of-128` for a minute.
"""

import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from moec.runtime.bench.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()  # before transformers is imported

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Llama4TextConfig,
    OlmoeConfig,
)

SCOUT = Path(__file__).parents[2] / "examples" / "tiny-scout"
LENGTH, ROWS, SECONDS, RATE = 512, 2, 330.0, 4e-3
BIAS_RATE, PIECE, TOKENS = 5e-3, 64, 1_500_000
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
        qk_nope_head_dim=16, v_head_dim=24, num_mtp_layers=0,
    ),
    "llama4-heads-of-128": Llama4TextConfig(
        **SHARED | {"hidden_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 4096},
        intermediate_size=256, intermediate_size_mlp=512, num_key_value_heads=2, head_dim=128,
        num_local_experts=8, interleave_moe_layer_step=1, attention_chunk_size=128,
        attn_temperature_tuning=True, floor_scale=64, use_qk_norm=True, tie_word_embeddings=False,
    ),
}  # fmt: skip


def held_out() -> Tensor:
    """The windows that tests measure [16, 513]."""
    return load_file(SCOUT / "golden.safetensors")["eval_ids"].long()


def tokens() -> Tensor:
    """Some `TOKENS` tokens of files [n], none of which has a piece of a window in it."""
    tokenizer = AutoTokenizer.from_pretrained(SCOUT)
    pieces = tokenizer.batch_decode(held_out()[:, :512].reshape(-1, PIECE))
    pieces = [piece.strip("\ufffd") for piece in pieces]  # half a character at either end
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if "site-packages" not in file.parts)
    random.Random(0).shuffle(files)
    found: list[int] = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if not any(piece in text for piece in pieces):
            found += [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        if len(found) > TOKENS:
            break
    return torch.tensor(found)


def balance(router: torch.nn.Module, _: tuple[Tensor], out: tuple[Tensor, ...]) -> None:
    """Lower the bias of experts that got more than their share, raise that of the others."""
    if router.training:
        bias = router.e_score_correction_bias
        loads = out[2].flatten().bincount(minlength=len(bias)).float()
        bias += BIAS_RATE * (loads.mean() - loads).sign()


def loss_of(logits: Tensor, rows: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def main() -> None:
    name, out, seconds = sys.argv[1], Path(sys.argv[2]), float([*sys.argv, SECONDS][3])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    own, held = tokens().to(device), held_out().to(device)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(device).train()
    count = ROWS if device == "cpu" else 8 * ROWS
    biased = [each for each in model.modules() if hasattr(each, "e_score_correction_bias")]
    for router in biased:
        router.register_forward_hook(balance)
    of_loss = not biased and hasattr(model.config, "router_aux_loss_coef")
    of_loss = of_loss and not isinstance(model.config, Llama4TextConfig)
    more = {"output_router_logits": True} if of_loss else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 50) * (1 - done) + 1e-5
        starts = torch.randint(len(own) - LENGTH, (count, 1), device=device)
        rows = own[starts + torch.arange(LENGTH + 1, device=device)]
        found = model(input_ids=rows[:, :-1], use_cache=False, **more)
        loss = loss_of(found.logits, rows)
        whole = loss if not of_loss else loss + model.config.router_aux_loss_coef * found.aux_loss
        optimizer.zero_grad()
        whole.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(step, f"{done:.2f}", f"{loss.item():.3f}", flush=True)
    model.eval().bfloat16().save_pretrained(out)
    with torch.inference_mode():
        loss = loss_of(model.float()(input_ids=held[:, :-1]).logits, held)
    print(f"{step} steps; perplexity {loss.exp().item():.4f} over 16 windows that were held out")


if __name__ == "__main__":
    main()
