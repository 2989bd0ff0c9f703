"""Converts a checkpoint of an 8B model's shape: time, processor time, memory; beside llama.cpp's two steps when asked.

    python benchmarks/conversion.py --types q8_0 q4_0 q4_k_m --layers 32
    python benchmarks/conversion.py --layers 8 --vocab 32000 --quantize build/bin/llama-quantize \\
        --convert venv/bin/python llama.cpp/convert_hf_to_gguf.py

The checkpoint (sharded BF16, random normal weights: 16 GB at 32 layers) is made in --folder. Memory is the peak of
anonymous pages, sampled; the file's own mapped pages do not count. Their way is convert_hf_to_gguf.py to BF16, once,
and llama-quantize of that for each type: "both" adds the two times, "ratio" is ours to that. Before each run the files
that it reads are dropped from the cache and nothing waits to be written. Ours ends when the file is on the disk; theirs
when it is written, and what waits for the disk then does not count.

Everything is deleted at the end. --frugal deletes the checkpoint as soon as their converter has read it (32 layers: 33
GB of disk instead of 41), --keep leaves it for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the small checkpoints of the tests

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHARD = 4_000_000_000  # bytes


def make_checkpoint(folder: Path, layers: int, vocab: int) -> None:
    from tests.convert.checkpoints import bpe_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers, "vocab_size": vocab}))
    (folder / "tokenizer.json").write_text(json.dumps(bpe_tokenizer()))
    h, ff, kv = 4096, 14336, 1024
    shapes = {"model.embed_tokens.weight": (vocab, h), "lm_head.weight": (vocab, h), "model.norm.weight": (h,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        shapes |= {p + f"self_attn.{x}_proj.weight": (n, h) for x, n in (("q", h), ("k", kv), ("v", kv), ("o", h))}
        shapes |= {p + "mlp.gate_proj.weight": (ff, h), p + "mlp.up_proj.weight": (ff, h)}
        shapes |= {p + "mlp.down_proj.weight": (h, ff)}
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 25, np.float32) * 0.02).view(np.uint32)
    pool = ((pool + 0x8000) >> 16).astype("<u2")  # bfloat16
    index: dict[str, str] = {}
    shard: dict[str, tuple[int, ...]] = {}
    number = size = 0
    for n, (name, shape) in enumerate(shapes.items()):
        shard[name] = shape
        size += 2 * int(np.prod(shape))
        if size > SHARD or n == len(shapes) - 1:
            number += 1
            file = f"model-{number:05}.safetensors"
            write_shard(folder / file, shard, pool, rng)
            index |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], pool: np.ndarray, rng: np.random.Generator) -> None:
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            left = int(np.prod(shape))
            while left:  # pieces of the pool from anywhere: rows do not repeat one another
                start = int(rng.integers(0, pool.size // 2))
                count = min(left, pool.size // 2)
                pool[start : start + count].tofile(file)
                left -= count


def anonymous(process: int) -> int:
    """Bytes of anonymous memory in use now."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return 0


def timed(command: list[str]) -> tuple[float, float, int]:
    """Seconds, processor seconds, peak of anonymous bytes."""
    before, began, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            while process.poll() is None:
                peak = max(peak, anonymous(process.pid))
                time.sleep(0.02)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command} failed: {log.read()[-2000:]}")
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def make_cold(paths: Iterable[Path]) -> None:
    """Nothing of the files is cached, nothing waits to be written."""
    os.sync()
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checkpoint_bytes(layers: int, vocab: int) -> int:
    return 2 * (layers * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336) + 2 * vocab * 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_0", "q4_k_m"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--convert", nargs=2, metavar=("PYTHON", "SCRIPT"), help="their convert_hf_to_gguf.py")
    parser.add_argument("--quantize", metavar="PROGRAM", help="their llama-quantize")
    parser.add_argument("--frugal", action="store_true")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    source = args.folder / f"checkpoint-8b-{args.layers}-{args.vocab}"
    out, plain = args.folder / "conversion-out.gguf", args.folder / "conversion-bf16.gguf"
    args.folder.mkdir(parents=True, exist_ok=True)
    size = checkpoint_bytes(args.layers, args.vocab)
    made = (source / "model.safetensors.index.json").exists()
    peak = size * (0.55 if not args.quantize else 1 if args.frugal else 1.55) + (0 if made else size)
    if (free := shutil.disk_usage(args.folder).free) < peak + 1e9:
        raise SystemExit(f"{args.folder} has {free / 1e9:.1f} GB free; this run needs {peak / 1e9 + 1:.1f} GB")
    try:
        if not made:
            print(f"making {source}", file=sys.stderr)
            make_checkpoint(source, args.layers, args.vocab)
        ours = {kind: ours_of(kind, source, out, args.threads) for kind in args.types}
        theirs = theirs_of(source, plain, out, args) if args.quantize else {}
    finally:
        for path in (out, plain):
            path.unlink(missing_ok=True)
        if not args.keep:
            shutil.rmtree(source, ignore_errors=True)
    print("| type | seconds | processor seconds | peak anonymous MiB", end="")
    print(" | theirs: converter | quantiser | its processor seconds | both | ratio |" if theirs else " |")
    print("|---|---|---|---" + ("|---|---|---|---|---|" if theirs else "|"))
    for kind, (wall, cpu, memory) in ours.items():
        row = f"| {kind} | {wall:.1f} | {cpu:.1f} | {memory / 2**20:.0f} |"
        if theirs:
            first, (second, their_cpu, _) = theirs[""][0], theirs[kind]
            row += f" {first:.1f} | {second:.1f} | {their_cpu:.1f} | {first + second:.1f} |"
            row += f" {wall / (first + second):.2f} |"
        print(row, flush=True)


def ours_of(kind: str, source: Path, out: Path, threads: int) -> tuple[float, float, int]:
    command = [sys.executable, "-m", "pyengine_convert.cli", str(source), "--type", kind, "--threads", str(threads)]
    make_cold(source.iterdir())
    times = timed([*command, "-o", str(out)])
    out.unlink()
    return times


def theirs_of(source: Path, plain: Path, out: Path, args: argparse.Namespace) -> dict[str, tuple[float, float, int]]:
    """Of their converter under "", of their quantiser under each type."""
    times = {}
    if args.convert:
        # Their converter knows tokenizers by the hashes of published ones: the vocabulary of random weights is none of
        # them. Only the tokenizer is left out of what it does.
        make_cold(source.iterdir())
        times[""] = timed([args.convert[0], "-c", THEIR_CONVERTER, args.convert[1], str(source), str(plain)])
    else:
        subprocess.run(
            [sys.executable, "-m", "pyengine_convert.cli", str(source), "-o", str(plain), "--type", "bf16"], check=True
        )
        times[""] = (0.0, 0.0, 0)
    if args.frugal:
        shutil.rmtree(source)
    for kind in args.types:
        make_cold([plain])
        times[kind] = timed([args.quantize, str(plain), str(out), kind.upper(), str(args.threads)])
        out.unlink()
    return times


THEIR_CONVERTER = """
import runpy, sys
from pathlib import Path
script, source, out = sys.argv[1:]
sys.path.insert(0, str(Path(script).parent))
from conversion.llama import LlamaModel
LlamaModel.set_vocab = lambda self: self._set_vocab_none()
sys.argv = [script, source, "--outfile", out, "--outtype", "bf16"]
runpy.run_path(script, run_name="__main__")
"""

if __name__ == "__main__":
    main()
