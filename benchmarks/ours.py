"""pyengine behind the protocol of benchmarks/peer.cc: same commands, same clock, same token ids.

    python benchmarks/ours.py MODEL threads=2 context=1024 kv=f16

Reads commands from standard input, answers each with one line of JSON; see benchmarks/peers.py.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

import pyengine


def main() -> None:
    path, *settings = sys.argv[1:]
    option = dict(s.split("=", 1) for s in settings)
    kv_type: Any = option["kv"]
    start = time.perf_counter()
    model = pyengine.Model.open(path)
    session = model.session(n_ctx=int(option["context"]), threads=int(option["threads"]), kv_type=kv_type)
    opened = time.perf_counter() - start

    def ids(first: int, n: int) -> list[int]:
        return [(i * 7919 + 13) % model.n_vocab for i in range(first, first + n)]

    def answer(**values: object) -> None:
        print(json.dumps(values), flush=True)

    def fill(depth: int) -> None:
        """The context to exactly ``depth`` tokens; only what is missing is evaluated."""
        if len(session) < depth:
            session.truncate(0)
            session.prefill(ids(0, depth))
        session.truncate(depth)

    logits = session.eval(ids(0, 1))
    answer(open=opened, first=time.perf_counter() - start, finite=bool(np.isfinite(logits).all()))

    for line in sys.stdin:
        command, *words = line.split()
        n = int(words[0])
        if command == "prefill":
            session.truncate(0)
            tokens = ids(0, n)
            t = time.perf_counter()
            session.eval(tokens)
            answer(seconds=[time.perf_counter() - t])
        elif command == "decode":
            depth = int(words[1])
            fill(depth)
            session.eval(ids(depth, 1))  # wakes the threads; not timed
            session.truncate(depth)
            steps = []
            for i in range(n):
                token = ids(depth + i, 1)
                t = time.perf_counter()
                session.eval(token)
                steps.append(time.perf_counter() - t)
            answer(seconds=steps)
        elif command == "logits":
            tokens = np.fromfile(words[1], "<i4", n).tolist()
            session.truncate(0)
            with open(words[2], "ab") as rows:
                session.eval(tokens, all_logits=True).tofile(rows)
            answer(rows=n, vocab=model.n_vocab)
        else:
            raise SystemExit(f"unknown command {line!r}")


if __name__ == "__main__":
    main()
