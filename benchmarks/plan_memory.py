"""What a plan predicts against what a process then uses: anonymous and mapped memory, file by file, context by context.

    python benchmarks/plan_memory.py A.gguf B.gguf [--contexts 1k,4k,32k] [--kv-types f16,q8_0] [--most 6]

Each row is a new process that does what a chat does: opens the model, builds the tokenizer, reads a text, generates.
``--fill`` reads as many tokens as the context holds; otherwise a few, and the pages of cache and scratch that a
longer text would touch are asked for (MADV_POPULATE_WRITE, Linux 5.14): seconds where reading 32k tokens takes
minutes. Anonymous memory is the process's RssAnon, mapped memory the size of the file's mapping. Exit status 1 when
a row is off by more than ``--tolerance`` (2 %).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pyengine.bench import markdown, plain
from pyengine.model import KV_TYPES, KvType
from pyengine.planner import THIS_FILE, plan, tokens

PROGRAM = r"""
import ctypes, json, mmap, re, sys
from pathlib import Path
import pyengine, pyengine.generate
from pyengine.chat import ChatTemplate

path, n_ctx, kv, fill = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "fill"
regions = lambda: re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ 0 +$", Path("/proc/self/maps").read_text(), re.M)
model = pyengine.Model.open(path)
try:
    ChatTemplate.from_metadata(model.metadata, model.tokenizer)
except pyengine.EngineError:
    pass  # a file without one
before = set(regions())
session = model.session(n_ctx=n_ctx, threads=2, kv_type=kv)
last = session.eval([i % model.n_vocab for i in range(n_ctx - 1 if fill else min(n_ctx - 1, 4))])
last = session.eval([1])
if not fill:
    libc = ctypes.CDLL(None, use_errno=True)
    sizes = [-(-n // (2 << 20)) * (2 << 20) for n in model.session_bytes(n_ctx=n_ctx, threads=2, kv_type=kv)]
    # Cache and scratch may have become one region; thread stacks and arenas are no multiple of 2 MiB or not readable.
    for low, high, flags in set(regions()) - before:
        size = int(high, 16) - int(low, 16)
        if flags == "rw-p" and (size in sizes or size == sum(sizes)):
            if libc.madvise(ctypes.c_void_p(int(low, 16)), ctypes.c_size_t(size), 23) != 0:
                raise SystemExit(f"MADV_POPULATE_WRITE: error {ctypes.get_errno()}; use --fill")
            sizes = [n for n in sizes if n != size] if size in sizes else []
    if any(n >= 4 << 20 for n in sizes):
        raise SystemExit(f"no memory region of {sizes} bytes; use --fill")
status = Path("/proc/self/status").read_text()
maps = Path("/proc/self/smaps").read_text()
mapped = re.search(re.escape(path) + r"\nSize: *(\d+) kB\n(?:.*\n)*?Rss: *(\d+) kB", maps)
print(json.dumps([1024 * int(n) for n in (re.search(r"RssAnon:\s*(\d+)", status)[1], mapped[1], mapped[2])]))
"""


@dataclass(frozen=True)
class Used:
    """Bytes that a process used (``mapped``: the file's mapping, ``resident`` of it), and that were planned."""

    anonymous: int
    mapped: int
    resident: int
    planned_anonymous: int
    planned_mapped: int

    @property
    def errors(self) -> tuple[float, float]:
        """Planned to used, less 1: of anonymous, of mapped memory."""
        return self.planned_anonymous / self.anonymous - 1, self.planned_mapped / self.mapped - 1


def use(path: Path, n_ctx: int, kv: KvType, *, fill: bool) -> Used:
    """Plans and measures one combination."""
    command = [sys.executable, "-c", PROGRAM, str(path.resolve()), str(n_ctx), kv, "fill" if fill else "touch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{path.name}, {n_ctx}, {kv}: {done.stderr.strip()}")
    memory = plan(path, contexts=[n_ctx], kv_types=[kv], quantisations=["Q8_0"], threads=2, ram=1 << 40)
    planned = memory.cell(THIS_FILE, n_ctx, kv).memory
    return Used(*json.loads(done.stdout.splitlines()[-1]), planned.anonymous, planned.weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--contexts", default="1k,4k,32k")
    parser.add_argument("--kv-types", default="f16,q8_0", help=f"of {', '.join(KV_TYPES)}")
    parser.add_argument("--most", type=float, default=6, metavar="GIB", help="leave out what needs more private memory")
    parser.add_argument("--fill", action="store_true", help="really read as many tokens as the context holds")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    cells = [["model", "context", "cache", "MiB planned", "used", "", "mapped planned", "used", "", "resident"]]
    worst = 0.0
    for path in args.models:
        for word in args.contexts.split(","):
            n_ctx = int(word.rstrip("k")) * (1024 if word.endswith("k") else 1)
            for kv in args.kv_types.split(","):
                memory = plan(path, contexts=[n_ctx], kv_types=[kv], quantisations=["Q8_0"], threads=2, ram=1 << 40)
                if memory.cell(THIS_FILE, n_ctx, kv).memory.anonymous > args.most * 2**30:
                    continue
                used = use(path, n_ctx, kv, fill=args.fill)
                worst = max(worst, *map(abs, used.errors))
                mib = [f"{n / 2**20:.1f}" for n in (used.planned_anonymous, used.anonymous)]
                mapped = [f"{n / 2**20:.0f}" for n in (used.planned_mapped, used.mapped, used.resident)]
                signs = [f"{100 * e:+.1f} %" for e in used.errors]
                cells.append([path.stem, tokens(n_ctx), kv, *mib, signs[0], *mapped[:2], signs[1], mapped[2]])
                print("  ".join(cells[-1]), file=sys.stderr, flush=True)
    print(markdown(cells) if args.markdown else plain(cells))
    print(f"{len(cells) - 1} combinations, the worst is off by {100 * worst:.1f} %")
    return 0 if worst <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
