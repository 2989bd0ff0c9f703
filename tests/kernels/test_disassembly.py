"""The hot loops of the kernels keep everything in registers: the built objects, as objdump reads them.

A hot loop is an innermost loop (a backward jump with no other inside) that multiplies, or a function that is one's body
unrolled. It may write its results and read panels, also where those lie on the stack, through pointers. What it must
not do is keep a vector in a fixed stack slot: no vector store to one, and no vector operand from one that the function
fills by a vector store (a spill made elsewhere and reloaded here). In an unrolled body a store alone is a copy made at
entry.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import check_program

MULTIPLY = re.compile(r"^(vpmaddubsw|vpdpbusds?|vpdpwssds?|vpmaddwd|vfn?madd\d+[ps]s|vfn?msub\d+[ps]s)$")
UNROLLED = 64  # a function without a loop that multiplies so often is a hot loop's body
FIXED_SLOT = re.compile(r"\[(rsp|rbp)(?:([+-])0x([0-9a-f]+))?\]")
VECTOR = re.compile(r"\b[xyz]mm\d+\b")

# (tier, object, functions, at least how many hot loops): what is looked at. Where fewer loops are found than this, the
# object was not understood.
HOT = [
    ("avx2", "linear_q32", r"(multiply|fused8)<", 12),
    ("avx2", "linear_q5", r"multiply<", 9),
    ("avx2", "linear_q23k", r"multiply<", 6),
    ("avx2", "linear_q256", r"(multiply_(k4|steps)|fused_block(_k4)?)<", 32),
    ("avx2", "linear_iq4", r"multiply<", 6),
    ("avx2", "attention", r"(panel|score)<", 24),
    ("avx512", "attention", r"(panel|score)<", 24),
    ("avx2", "linear_iq", r"multiply<", 6),
    ("avx512", "linear_q32", r"multiply_panel<", 6),
    ("avx512", "linear_q256", r"multiply_panel<", 6),
]

# What still keeps one vector, and how many instructions touch it: fewer is progress, more is not.
KNOWN = {
    r"score<.*Q8_0, 3,": 4,  # three heads, one token
    r"panel<.*Panels, 6,": 2,  # the keys that not all of its six rows see
}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        found = re.match(r"([0-9a-f]+)\b", self.operands)
        return int(found[1], 16) if self.name.startswith("j") and found else None


Function = list[Instruction]


def disassemble(path: Path) -> dict[str, Function]:
    """The functions of an object or shared library by their C++ names."""
    command = ["objdump", "-d", "-C", "-M", "intel", "--no-show-raw-insn", str(path)]
    functions: dict[str, Function] = {}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = functions.setdefault(header[1], [])
        elif code := re.match(r"\s*([0-9a-f]+):\s+(?:(?:rep|notrack|bnd|lock|data16) )*(\S+)\s*(.*)$", line):
            current.append(Instruction(int(code[1], 16), code[2], re.sub(r"\s*[<#].*$", "", code[3])))
    return functions


def innermost_loops(code: Function) -> Iterator[Function]:
    """Bodies of the backward jumps that enclose no other."""
    first, last = code[0].address, code[-1].address
    back = {(i.target, i.address) for i in code if i.target is not None and first <= i.target <= i.address <= last}
    for low, high in sorted(back):
        if not any((a, b) != (low, high) and low <= a and b <= high for a, b in back):
            yield [i for i in code if low <= i.address <= high]


def vector_slots(code: Function) -> dict[str, list[Instruction]]:
    """Fixed stack slots that vectors are stored to. rbp counts where it is a frame pointer."""
    framed = any(i.name == "mov" and i.operands == "rbp,rsp" for i in code)
    slots: dict[str, list[Instruction]] = {}
    for i in code:
        found = FIXED_SLOT.search(i.operands.split(",")[0])
        if found and i.name.startswith("v") and VECTOR.search(i.operands) and (found[1] == "rsp" or framed):
            slots.setdefault(found[0], []).append(i)
    return slots


def spills(code: Function) -> tuple[int, list[str]]:
    """The number of hot loops, and what in them keeps a vector on the stack."""
    slots = vector_slots(code)
    hot, found = 0, []
    bodies = [body for body in innermost_loops(code) if any(MULTIPLY.match(i.name) for i in body)]
    unrolled = not bodies and sum(bool(MULTIPLY.match(i.name)) for i in code) >= UNROLLED
    if unrolled:
        bodies = [code]  # the loop around it is the caller's
    for body in bodies:
        hot += 1
        for i in body:
            slot = FIXED_SLOT.search(i.operands)
            stores = FIXED_SLOT.search(i.operands.split(",")[0])
            if slot and slot[0] in slots and i.name.startswith("v") and not (unrolled and stores):
                found.append(f"{i.address:x}: {i.name} {i.operands}")
    return hot, found


def objdump() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")


def built_object(tier: str, name: str) -> Path:
    build = check_program("kernel_check").parent.parent
    found = sorted(build.glob(f"**/pe_kernels_{tier}.dir/**/{name}.cc.o*"))
    if not found:
        pytest.skip(f"the {tier} tier is not built here")
    return found[0]


@pytest.mark.as_built
@pytest.mark.parametrize(("tier", "name", "functions", "least"), HOT, ids=[f"{h[0]}-{h[1]}" for h in HOT])
def test_hot_loops_keep_no_vector_on_the_stack(tier: str, name: str, functions: str, least: int) -> None:
    objdump()
    hot, wrong = 0, []
    for function, code in disassemble(built_object(tier, name)).items():
        if re.search(functions, function):
            loops, found = spills(code)
            hot += loops
            known = sum(n for name, n in KNOWN.items() if re.search(name, function))
            found = found if len(found) > known else []
            wrong += [f"{function}: {what}" for what in found]
    assert hot >= least
    assert not wrong, "\n".join(wrong)


def kernel_with(sums: int) -> str:
    """C++ of a loop with so many sums alive in it; there are 16 registers."""
    each = range(sums)
    lines = [
        "#include <immintrin.h>",
        "void kernel(const __m256i* w, const __m256i* x, __m256i* y, long n) {",
        *(f"  __m256i s{i} = _mm256_loadu_si256(y + {i});" for i in each),
        "  for (long k = 0; k < n; ++k) {",
        "    const __m256i a = _mm256_loadu_si256(w + k);",
        *(f"    s{i} = _mm256_add_epi16(s{i}, _mm256_maddubs_epi16(a, _mm256_loadu_si256(x++)));" for i in each),
        "  }",
        *(f"  _mm256_storeu_si256(y + {i}, s{i});" for i in each),
        "}",
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(("sums", "clean"), [(12, True), (20, False)])
def test_the_rule_finds_a_loop_that_spills_and_passes_one_that_does_not(tmp_path: Path, sums: int, clean: bool) -> None:
    objdump()
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None or os.uname().machine != "x86_64":
        pytest.skip("needs a compiler for x86-64")
    source = tmp_path / "kernel.cc"
    source.write_text(kernel_with(sums))
    made = tmp_path / "kernel.o"
    subprocess.run([compiler, "-O3", "-mavx2", "-c", str(source), "-o", str(made)], check=True)
    (code,) = [c for name, c in disassemble(made).items() if name.startswith("kernel")]
    hot, found = spills(code)
    assert hot == 1
    assert (found == []) == clean
