"""Converts a checkpoint of an 8B model's shape: time, processor time, memory; beside llama.cpp's quantiser when asked.

    python benchmarks/conversion.py --types q8_0 q4_0 q4_k_m --layers 32
    python benchmarks/conversion.py --types q4_k_m --layers 4 --peer build/bin/libllama.so

The checkpoint (sharded BF16, random normal weights: 16 GB at 32 layers) is made in --folder once. Memory is the peak of
anonymous pages, sampled; the file's own mapped pages do not count. The peer quantises the BF16 GGUF that our converter
made of the same checkpoint: the time of its own conversion is not in the figure, which favours it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
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
    "vocab_size": 128256,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHARD = 4_000_000_000  # bytes


def make_checkpoint(folder: Path, layers: int) -> None:
    from tests.convert.checkpoints import bpe_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    (folder / "tokenizer.json").write_text(json.dumps(bpe_tokenizer()))
    h, ff, kv, vocab = 4096, 14336, 1024, 128256
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
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, cpu, peak


PEER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.conversion import quantise_there
quantise_there(*sys.argv[1:])
"""


class PeerParameters(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_ = [
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("output_type", ctypes.c_int),
        ("embedding_type", ctypes.c_int), ("allow_requantize", ctypes.c_bool), ("quantize_output", ctypes.c_bool),
        ("only_copy", ctypes.c_bool), ("pure", ctypes.c_bool), ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool), ("imatrix", ctypes.c_void_p), ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p), ("prune_layers", ctypes.c_void_p), ("max_buf_size", ctypes.c_size_t),
    ]  # fmt: skip


def quantise_there(library: str, source: str, out: str, file_type: str, threads: str) -> None:
    for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
        ctypes.CDLL(str(Path(library).parent / name), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(library)
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    llama.llama_model_quantize_default_params.restype = PeerParameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(file_type), int(threads)
    if llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)):
        raise SystemExit("the peer's quantiser failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_0", "q4_k_m"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer", metavar="LIBLLAMA.SO", help="time llama.cpp's quantiser, too")
    args = parser.parse_args()
    source = args.folder / f"checkpoint-8b-{args.layers}"
    if not (source / "model.safetensors.index.json").exists():
        print(f"making {source}", file=sys.stderr)
        make_checkpoint(source, args.layers)
    out = args.folder / "conversion-out.gguf"
    convert = [sys.executable, "-m", "pyengine_convert.cli", "--threads", str(args.threads), "--force", "-o"]
    plain = args.folder / "conversion-bf16.gguf"
    if args.peer:
        subprocess.run([*convert, str(plain), str(source), "--type", "bf16"], check=True)
    from pyengine_convert.recipe import find_recipe

    print("| type | seconds | processor seconds | peak anonymous MiB | llama.cpp, seconds | processor seconds |")
    print("|---|---|---|---|---|---|")
    for kind in args.types:
        wall, cpu, peak = timed([*convert, str(out), str(source), "--type", kind])
        row = f"| {kind} | {wall:.1f} | {cpu:.1f} | {peak / 2**20:.0f} |"
        if args.peer:
            number = str(find_recipe(kind).file_type)
            command = [sys.executable, "-c", PEER, args.peer, str(plain), str(out), number, str(args.threads)]
            wall, cpu, _ = timed(command)
            row += f" {wall:.1f} | {cpu:.1f} |"
        print(row, flush=True)
        out.unlink(missing_ok=True)
    plain.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
