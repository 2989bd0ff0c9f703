"""Writes csrc/quant/codebooks.h: the codebooks of the IQ formats, which are data of the format.

    python tools/codebooks.py > csrc/quant/codebooks.h

The source is the ``gguf`` package (gguf/quants.py: ``grid_hex``), which packs a codebook's entries into 16 bits each.
"""

from __future__ import annotations

import sys

import numpy as np
from gguf import quants

BOOKS = {
    "kIq2XxsGrid": (quants.IQ2_XXS, "eight values of two bits: kIq2Levels"),
    "kIq2XsGrid": (quants.IQ2_XS, "the same"),
    "kIq2SGrid": (quants.IQ2_S, "the same"),
    "kIq3XxsGrid": (quants.IQ3_XXS, "four values of four bits: kIq3Levels"),
    "kIq3SGrid": (quants.IQ3_S, "four values of four bits: value v is 2 v + 1"),
    "kIq1Grid": (quants.IQ1_S, "eight values of two bits: value v is v - 1"),
}
HEAD = """// The codebooks of the IQ formats, written by tools/codebooks.py from those of the gguf package.
// The values of an entry start at its lowest bit.
#pragma once

#include <stdint.h>

namespace pe {

// clang-format off
"""
PER_LINE = 16


def levels(name: str, values: tuple[int | float, ...]) -> str:
    return f"static constexpr uint8_t {name}[{len(values)}] = {{{', '.join(map(str, values))}}};\n"


def header() -> str:
    """The text of the file."""
    out = [HEAD, levels("kIq2Levels", quants.IQ2_XXS.grid_map), levels("kIq3Levels", quants.IQ3_XXS.grid_map)]
    for name, (kind, what) in BOOKS.items():
        entries = np.frombuffer(bytes.fromhex((kind.grid_hex or b"").decode()), "<u2")
        assert len(entries) == kind.grid_shape[0]
        out.append(f"\n// {kind.qtype.name}: {what}\nstatic constexpr uint16_t {name}[{len(entries)}] = {{\n")
        for i in range(0, len(entries), PER_LINE):
            out.append("    " + ", ".join(map(str, entries[i : i + PER_LINE])) + ",\n")
        out.append("};\n")
    out.append("// clang-format on\n\n}  // namespace pe\n")
    return "".join(out)


if __name__ == "__main__":
    sys.stdout.write(header())
