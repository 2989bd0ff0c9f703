"""From nothing to the first logits: opening the model, with and without its tokenizer, and the memory that takes.

    python benchmarks/load.py MODEL.gguf

Each round is a new process with the file in the page cache; importing the package is not counted.
"""

from __future__ import annotations

from common import finish, in_new_process, interleave, model_path, parser, start

PROGRAM = """
import json, sys, time
import pyengine
from common import anonymous_bytes, finish
path, threads, tokenizer = json.loads(sys.argv[1])  # "none", "meanwhile" (the default), "before"
before = anonymous_bytes()
t0 = time.perf_counter()
model = pyengine.Model.open(path, tokenizer_ahead=tokenizer != "none")
t1 = time.perf_counter()
if tokenizer == "before": model.tokenizer
t2 = time.perf_counter()
session = model.session(n_ctx=64, threads=threads)
session.eval([1, 2, 3, 4])
t3 = time.perf_counter()
kv, scratch = model.session_bytes(n_ctx=64, threads=threads)
print(json.dumps({"open": t1 - t0, "tokenizer": t2 - t1, "first": t3 - t0,
                  "memory": (anonymous_bytes() - before - kv - scratch) / 1e6}))
"""


def main() -> None:
    args = parser(__doc__).parse_args()
    path = model_path(args)
    report = start(args, "load", path)
    opened = report.row("Model.open", "s")
    alone = report.row("to the first logits of four ids, no tokenizer", "s")
    logits = report.row("to the first logits of four ids, tokenizer meanwhile", "s")
    memory = report.row("anonymous memory beyond cache and scratch", "MB")
    tokenizer = report.row("tokenizer", "s")
    both = report.row("to the first logits, tokenizer built before", "s")

    def no_tokenizer() -> None:
        alone.values.append(in_new_process(PROGRAM, str(path), args.threads, "none")["first"])

    def ids() -> None:
        figures = in_new_process(PROGRAM, str(path), args.threads, "meanwhile")
        opened.values.append(figures["open"])
        logits.values.append(figures["first"])
        memory.values.append(figures["memory"])

    def text() -> None:
        figures = in_new_process(PROGRAM, str(path), args.threads, "before")
        tokenizer.values.append(figures["tokenizer"])
        both.values.append(figures["first"])

    in_new_process(PROGRAM, str(path), args.threads, "none")  # fills the page cache
    interleave(args.rounds, {"no tokenizer": no_tokenizer, "from ids": ids, "from text": text})
    finish(report, args)


if __name__ == "__main__":
    main()
