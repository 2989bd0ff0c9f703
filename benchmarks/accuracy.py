"""Perplexity and KL divergence of every weight type, here and in llama.cpp, on the same files and tokens.

    python benchmarks/accuracy.py ../shared/data [--windows 240] [--types Q4_K Q6_K] [--text tinystories] [--json FILE]

For each trained model (a Hugging Face folder 256 columns wide under models/): the F32 file is written by our
converter, and llama.cpp's quantiser makes one file of each type from it, every matrix in that type (its ``pure``
option). Both engines evaluate the same windows of 256 tokens, the beginning-of-sequence token first, KV cache f16;
llama.cpp with its defaults but without flash attention (which sums values in half precision). From the raw logits:

    perplexity   exp of the mean negative log likelihood of the next token; "difference" is ours / theirs - 1
    divergence   mean over all positions of KL(F32 || quantised), F32 being the F32 file here with an F32 cache; "ratio"
                 is ours / theirs, with the standard error of the ratio from the windows

A type passes when the perplexities differ by at most 0.1 % and our divergence is at most 2 % above theirs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

import pyengine
from pyengine_convert.convert import convert

WINDOW = 256
MODELS = ("stories260K-llama-256d", "stories260K-qwen2-256d", "stories260K-qwen3-256d")
# llama_ftype of include/llama.h
TYPES = {
    **{"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "IQ4_NL": 25, "IQ4_XS": 30},
    **{"Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18},
}
MAX_PERPLEXITY, MAX_DIVERGENCE = 1e-3, 1.02
Logs = npt.NDArray[np.float64]


def quantise(source: Path, out: Path, kind: str) -> None:
    """``source`` (F32) with every matrix in ``kind``, by llama.cpp."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = TYPES[kind], True, 2
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}")


def windows(model: pyengine.Model, text: str, count: int) -> list[list[int]]:
    """``count`` windows of WINDOW ids, fewer where the text ends."""
    head = [model.tokenizer.bos_id] if model.tokenizer.bos_id is not None else []
    step = WINDOW - len(head)
    ids = model.tokenizer.encode(text, add_special=False)
    return [head + ids[i : i + step] for i in range(0, min(len(ids) - step + 1, count * step), step)]


def log_softmax(logits: npt.NDArray[np.float32]) -> Logs:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def ours(path: Path, batches: Sequence[list[int]], kv_type: str = "f16") -> Iterator[Logs]:
    """Log probabilities [WINDOW, n_vocab] of each batch."""
    with pyengine.Model.open(path) as model, model.session(n_ctx=WINDOW, threads=1, kv_type=kv_type) as session:  # type: ignore[arg-type]
        for ids in batches:
            session.truncate(0)
            yield log_softmax(session.eval(ids, all_logits=True))


def theirs(path: Path, batches: Sequence[list[int]], flash: bool = False) -> Iterator[Logs]:
    llm = llama_cpp.Llama(
        str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, n_threads=1, flash_attn=flash, verbose=False
    )
    for ids in batches:
        llm.reset()
        llm.eval(ids)
        yield log_softmax(llm.scores[: len(ids)])
    llm.close()


@dataclass(frozen=True)
class Comparison:
    """One file: perplexities, mean divergences from F32, and the standard error of their ratio."""

    model: str
    type: str
    tokens: int
    perplexity: float
    their_perplexity: float
    divergence: float
    their_divergence: float
    ratio_error: float
    between: float  # mean KL(theirs || ours)

    @property
    def difference(self) -> float:
        return self.perplexity / self.their_perplexity - 1

    @property
    def ratio(self) -> float:
        return self.divergence / self.their_divergence

    @property
    def passes(self) -> bool:
        return abs(self.difference) <= MAX_PERPLEXITY and self.ratio <= MAX_DIVERGENCE


def divergence(p: Logs, q: Logs) -> float:
    """Mean over the rows of KL(p || q)."""
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def compare(name: str, kind: str, path: Path, batches: Sequence[list[int]], exact: Sequence[Logs]) -> Comparison:
    here, there, between, nll = [], [], [], np.zeros(2)
    for ids, reference, a, b in zip(batches, exact, ours(path, batches), theirs(path, batches), strict=True):
        here.append(divergence(reference, a))
        there.append(divergence(reference, b))
        between.append(divergence(b, a))
        rows, targets = np.arange(len(ids) - 1), np.array(ids[1:])
        nll -= [a[rows, targets].mean(), b[rows, targets].mean()]
    perplexities = np.exp(nll / len(batches))
    h, t = np.array(here), np.array(there)
    ratio = h.mean() / t.mean()
    error = float((h - ratio * t).std(ddof=1) / t.mean() / np.sqrt(len(h)))
    tokens = sum(map(len, batches))
    return Comparison(name, kind, tokens, *map(float, perplexities), h.mean(), t.mean(), error, float(np.mean(between)))


def compare_all(data: Path, models: Sequence[str], types: Sequence[str], text: str, count: int) -> Iterator[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            plain = Path(folder) / "f32.gguf"
            convert(data / "models" / name, plain, "f32", force=True)
            with pyengine.Model.open(plain) as model:
                batches = windows(model, (data / "text" / text).read_text(encoding="utf-8"), count)
            exact = list(ours(plain, batches, "f32"))
            for kind in types:
                path = Path(folder) / f"{kind}.gguf"
                quantise(plain, path, kind)
                yield compare(name, kind, path, batches, exact)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that holds models/ and text/")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--text", default="tinystories.txt")
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| model | type | perplexity here / there | difference % | divergence here / there | ratio | |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for c in compare_all(args.data, args.models, args.types, args.text, args.windows):
        results.append(c)
        print(
            f"| {c.model} | {c.type} | {c.perplexity:.4f} / {c.their_perplexity:.4f} | {100 * c.difference:+.3f} "
            f"| {c.divergence:.3e} / {c.their_divergence:.3e} | {c.ratio:.3f} ± {c.ratio_error:.3f} "
            f"| {'' if c.passes else 'MISSES'} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(c) for c in results], indent=1))
    missed = sum(not c.passes for c in results)
    peer = f"llama-cpp-python {llama_cpp.__version__}"
    print(f"\n{len(results)} files, {results[0].tokens} tokens each, {peer}: {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
