"""Trains the demo model from nothing: tokenizer, weights and the files a Hugging Face checkpoint needs.

Development only: needs torch and transformers, which pyengine itself does not. One CPU core is enough. The learning
rate follows the clock, so `--minutes` is both the budget and the schedule.

    python tools/demo/train.py --minutes 40            # writes tools/demo/checkpoint
    python tools/demo/train.py --exam-only             # the held-out exam on an existing checkpoint
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from problems import Exchange, Problem, extract_answer, held_out, train_stream

HERE = Path(__file__).resolve().parent
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# Name and "special" flag, in the order and with the flags of the R1 distills.
ADDED = ((EOS, True), ("<｜User｜>", False), ("<｜Assistant｜>", False), (BOS, True), ("<think>", False),
         ("</think>", False))  # fmt: skip
# Qwen2's rule; its `\p{N}` makes every digit a token of its own, which is what makes column arithmetic learnable.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB = 1024
CONTEXT = 1024
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a careful math tutor.", "Answer briefly.")


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(seed: int, samples: int = 30_000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    # The full alphabet: all 256 bytes are tokens, so any text can be encoded.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(ADDED), initial_alphabet=alphabet, show_progress=False)
    exchanges = islice(train_stream(seed), samples)
    tokenizer.train_from_iterator((f"{e.question}\n{e.steps}\n\n\n{e.answer_text}" for e in exchanges), trainer)
    for name, special in ADDED:
        token = AddedToken(name, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos]
    )
    return tokenizer


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text_side(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, and tokenizer_config.json and generation_config.json as the R1 distills have them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": (HERE / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n"),
    }
    write_json(folder / "tokenizer_config.json", config)
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    write_json(folder / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.95})


def model_config(tokenizer: PreTrainedTokenizerFast, layers: int) -> dict[str, object]:
    """Widths are multiples of 256, so that every matrix can take every K-quant."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "torch_dtype": "bfloat16",
    }


def save_checkpoint(model: Qwen3ForCausalLM, config: dict[str, object], folder: Path) -> None:
    # Tied: the head is the embedding, and is left out as the format wants.
    weights = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def load_checkpoint(folder: Path) -> Qwen3ForCausalLM:
    """In float32 (of BF16-rounded weights). Plain attention: the fused one is slower on short CPU batches."""
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


# ---------------------------------------------------------------- batches


def prompt_of(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def conversation(stream: Iterator[Exchange], rng: Random, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """(prompt, reply) exactly as the chat template renders them. Some have earlier turns or a system prompt."""
    messages: list[dict[str, str]] = []
    if rng.random() < 0.05:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    turns = rng.choices((0, 1, 2), (85, 10, 5))[0]
    # A client may send back the reply whole; the template then keeps the line breaks after </think>.
    blank = "\n\n" if rng.random() < 0.2 else ""
    for earlier in islice(stream, turns):
        messages.append({"role": "user", "content": earlier.question})
        messages.append({"role": "assistant", "content": blank + earlier.answer_text})
    now = next(stream)
    messages.append({"role": "user", "content": now.question})
    return prompt_of(tokenizer, messages), f"{now.steps}\n</think>\n\n{now.answer_text}{EOS}"


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) of conversations of like length, so that padding is rare. Labels are -100 outside the reply.

    Padding is on the right, behind everything a causal model looks at, so no attention mask is needed.
    """
    stream, rng = train_stream(seed), Random(seed)
    pad = tokenizer.pad_token_id
    while True:
        pairs = [conversation(stream, rng, tokenizer) for _ in range(2048)]
        prompts, replies = (
            tokenizer(list(side), add_special_tokens=False)["input_ids"] for side in zip(*pairs, strict=True)
        )
        rows = sorted(zip(prompts, replies, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(row[0]) + len(row[1])) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(p) + len(r) for p, r in group)
            ids = [p + r + [pad] * (width - len(p) - len(r)) for p, r in group]
            labels = [[-100] * len(p) + r + [-100] * (width - len(p) - len(r)) for p, r in group]
            yield torch.tensor(ids), torch.tensor(labels)


# ---------------------------------------------------------------- training


def round_q4_0(weight: Tensor) -> Tensor:
    """What a Q4_0 file keeps of a matrix: per 32 values one scale and 16 levels."""
    blocks = weight.reshape(-1, 32)
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = peak / -8
    levels = torch.where(scale == 0, 0, blocks / scale).add(8.5).floor().clamp(0, 15) - 8
    return (levels * scale.half().float()).reshape(weight.shape)


@contextmanager
def rounded_weights(model: Qwen3ForCausalLM, active: bool) -> Iterator[None]:
    """Runs one step with Q4_0-rounded matrices; the gradient then updates the exact ones.

    Done on every other step, it leaves weights that work both exact and rounded.
    """
    matrices = [p for p in model.parameters() if p.dim() == 2] if active else []
    exact = [p.detach().clone() for p in matrices]
    with torch.no_grad():
        for p in matrices:
            p.copy_(round_q4_0(p))
    yield
    with torch.no_grad():
        for p, value in zip(matrices, exact, strict=True):
            p.copy_(value)


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the reply tokens; the head runs on those rows only."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    kept = wanted != -100
    return functional.cross_entropy(model.lm_head(hidden[kept]).float(), wanted[kept])


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms.

    Muon at 1.0 M tokens had half the loss that AdamW reached at 1.6 M. Its updates are scaled to AdamW's size, so
    one learning rate serves both.
    """
    inner, rest = [], []
    for name, p in model.named_parameters():
        (inner if p.dim() == 2 and "embed_tokens" not in name else rest).append(p)
    return [
        torch.optim.Muon(inner, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def average_gradients(model: Qwen3ForCausalLM, workers: int) -> None:
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    distributed.all_reduce(flat)
    flat /= workers
    for p, mean in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad.copy_(mean.view_as(p))


def train(rank: int, args: argparse.Namespace) -> None:
    """One of `--workers` equal processes of one thread each, which meet once a step to average their gradients.

    Threads would have to meet after every operator instead, which costs most when the machine has other work.
    """
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    meeting = f"file://{args.out.resolve()}/.meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.workers)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    config = model_config(tokenizer, args.layers)
    if args.start:
        model = load_checkpoint(args.start)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**config, attn_implementation="eager"))
    say = print if rank == 0 else lambda *_, **__: None
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = make_optimizers(model)

    started = saved = time.monotonic()
    tokens, losses = 0, []
    data = batches(tokenizer, args.data_seed + 1000 * rank, args.batch_tokens // args.workers)
    for step, (ids, labels) in enumerate(data, start=1):
        clock = torch.tensor((time.monotonic() - started) / (60 * args.minutes))
        distributed.broadcast(clock, 0)
        progress = clock.item()
        if progress >= 1:
            break
        rate = args.rate * min(step / 50, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        with rounded_weights(model, active=progress > args.round_from and step % 2 == 0):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, ids, labels)
            loss.backward()
        average_gradients(model, args.workers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel() * args.workers
        losses.append(loss.item())
        if step % 100 == 0:
            seconds, mean = time.monotonic() - started, sum(losses) / len(losses)
            say(f"{seconds:6.0f} s  step {step}  {tokens / 1e6:.2f} M tokens  loss {mean:.5f}", flush=True)
            losses.clear()
        if rank == 0 and time.monotonic() - saved > 300:
            save_checkpoint(model, config, args.out)
            saved = time.monotonic()
    if rank == 0:
        save_checkpoint(model, config, args.out)
    say(f"{step} steps, {tokens / 1e6:.2f} M tokens, {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


# ---------------------------------------------------------------- exam


@torch.inference_mode()
def replies(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    """Greedy replies, reasoning included."""
    tokenizer.padding_side = "left"
    prompts = [prompt_of(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    texts: list[str] = []
    for at in range(0, len(prompts), 50):
        batch = tokenizer(prompts[at : at + 50], add_special_tokens=False, padding=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=256, do_sample=False, temperature=None, top_p=None)
        rows = out[:, batch["input_ids"].shape[1] :]
        texts += [tokenizer.decode(row).split(EOS)[0] for row in rows]
    return texts


def exam(folder: Path, problems: list[Problem], q4_0: bool = False) -> float:
    """Share of exact answers of a saved checkpoint; prints the first mistakes."""
    model, tokenizer = load_checkpoint(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)
    wrong = []
    with rounded_weights(model, active=q4_0):
        texts = replies(model, tokenizer, [p.question for p in problems])
    for p, text in zip(problems, texts, strict=True):
        if extract_answer(text) != p.answer:
            wrong.append(f"  wrong ({p.kind}): {p.question!r} -> {text!r}")
    print(*wrong[:20], sep="\n")
    right = len(problems) - len(wrong)
    print(f"{'rounded to Q4_0' if q4_0 else 'BF16'}: {right} of {len(problems)} exact", flush=True)
    return right / len(problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="checkpoint folder")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint (its tokenizer must be in --out)")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--round-from", type=float, default=0.6, help="share of the run before Q4_0 rounding starts")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the tokenizer's text")
    parser.add_argument("--data-seed", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="training processes, one thread each")
    parser.add_argument("--exam", type=int, default=200, help="number of held-out problems")
    parser.add_argument("--exam-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.workers)
    if not args.exam_only:
        if not args.start:
            write_text_side(train_tokenizer(args.seed), args.out)
        (args.out / ".meeting").unlink(missing_ok=True)
        multiprocessing.spawn(train, (args,), nprocs=args.workers)
        (args.out / ".meeting").unlink(missing_ok=True)
    for q4_0 in (False, True):
        exam(args.out, held_out(args.exam), q4_0)


if __name__ == "__main__":
    main()
