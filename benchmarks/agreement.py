"""The types that we only read, here and in llama.cpp, on the same files: llama.cpp's quantiser makes them.

    python benchmarks/agreement.py ../shared/data/gguf/stories260K-llama-256d-F16.gguf --llama BUILD [--windows 20]

Every matrix of the model is quantised to the type by ``ggml_quantize_chunk`` with an importance matrix of ones, all
else is copied. Both engines evaluate the same windows of 128 ids, the beginning-of-sequence id first and the rest
sampled from the unquantised model. From the logits: mean KL(theirs || ours), how often the most likely token is the
same, and the mean KL(F16 || quantised) of each, the loss that the type itself brings. Two engines that round
activations differently cannot agree to the bit; a wrong code, sign or scale shows as a divergence of that size.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from peers import Engine, Peer, built, engines

import pyengine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "quant"))
from make_blocks import NAMES, quantise, quantiser

WINDOW = 128
Logs = npt.NDArray[np.float64]


def requantise(source: Path, out: Path, kind: str, peer: Peer) -> None:
    """``source`` with every matrix in ``kind``."""
    ggml = quantiser(next(p.parent for p in peer.libraries if "base" in p.name))
    reader = GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(out, arch)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value_type = entry.types[0]
        sub = entry.types[-1] if value_type == GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), value_type, sub)
    for t in reader.tensors:
        if len(t.shape) == 2:
            blocks = quantise(ggml, kind, np.asarray(t.data, np.float32).reshape(int(t.shape[1]), int(t.shape[0])))
            writer.add_tensor(t.name, blocks, raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(t.name, np.asarray(t.data), raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sampled(path: Path, count: int) -> list[list[int]]:
    """Windows of ids drawn from the model itself: text of the kind it knows."""
    rng = np.random.default_rng(0)
    with pyengine.Model.open(path) as model, model.session(n_ctx=WINDOW, threads=1) as session:
        out = []
        for _ in range(count):
            session.truncate(0)
            ids = [model.tokenizer.bos_id or 0]
            while len(ids) < WINDOW:
                p = np.exp(log_softmax(session.eval(ids[-1:])))
                ids.append(int(rng.choice(len(p), p=p / p.sum())))
            out.append(ids)
    return out


def log_softmax(logits: npt.NDArray[np.float32]) -> Logs:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def logits(engine: Engine, path: Path, batches: Sequence[list[int]], folder: Path) -> Logs:
    """Log probabilities [window, position, token]."""
    run = engine.start(path, 1, WINDOW, "f16")
    rows, ids = folder / "rows", folder / "ids"
    rows.unlink(missing_ok=True)
    for batch in batches:
        np.array(batch, np.int32).tofile(ids)
        vocab = int(run.ask("logits", len(batch), ids, rows)["vocab"])
    run.close()
    return log_softmax(np.fromfile(rows, np.float32).reshape(len(batches), WINDOW, vocab))


def divergence(p: Logs, q: Logs) -> float:
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="a folder where llama.cpp was built")
    parser.add_argument("--types", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--windows", type=int, default=20)
    args = parser.parse_args()
    peer = built("llama", args.llama)
    lineup = {e.family: e for e in engines(peer, None, "f16", ("pyengine", "llama+norepack"))}
    print("| type | KL(there, here) | same top token % | loss here | loss there |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batches = sampled(args.model, args.windows)
        exact = logits(lineup["pyengine"], args.model, batches, folder)
        for kind in args.types:
            path = folder / "model.gguf"
            requantise(args.model, path, kind, peer)
            here = logits(lineup["pyengine"], path, batches, folder)
            there = logits(lineup["llama"], path, batches, folder)
            same = (here.argmax(-1) == there.argmax(-1)).mean()
            losses = f"{divergence(exact, here):.3e} | {divergence(exact, there):.3e}"
            print(f"| {kind} | {divergence(there, here):.2e} | {100 * same:.2f} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
