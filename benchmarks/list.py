"""Lists the benchmarks: ``make bench``."""

from __future__ import annotations

import ast
from pathlib import Path

HELPERS = {"common", "list", "__init__"}


def main() -> None:
    print("make bench BENCH=NAME, or python benchmarks/NAME.py --help:\n")
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        if path.stem not in HELPERS:
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            print(f"  {path.stem:14} {doc.splitlines()[0] if doc else ''}")


if __name__ == "__main__":
    main()
