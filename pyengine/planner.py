"""Will it fit, and how fast: memory and speed of a model for quantisations and contexts, before anything is downloaded.

The sizes of KV cache and scratch come from the code that allocates them (``pe_shape_bytes``). See docs/planning.md.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyengine import synthetic
from pyengine.errors import InvalidArgument, UnsupportedError
from pyengine.forecast import Speed, Work, measure
from pyengine.hub import is_name, outline
from pyengine.memory import available_memory
from pyengine.model import KV_TYPES, MAX_THREADS, KvType, Model, default_threads, shape_bytes
from pyengine.recipe import find_recipe
from pyengine.shape import Shape, find_card, from_config, of_model

GIB = 1 << 30
CONTEXTS = tuple(k * 1024 for k in (1, 4, 8, 16, 32, 63, 128))
QUANTISATIONS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
THIS_FILE = "this file"

# Memory of common machines, and what is left of it to the system and a desktop.
MACHINES = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SYSTEM_BYTES = 2 * GIB
# A plan that leaves less than this is tight: half of it is what sessions may keep of earlier texts (``prefix_bytes``).
MARGIN_BYTES = GIB // 2
# The interpreter with the packages a chat imports, and the tokenizer; measured on CPython 3.11, tokenizers 0.23
# (benchmarks/plan_memory.py): the middle of what processes use, which differs by 3 MiB from run to run.
_PROCESS_BYTES = 43 << 19
_TOKEN_BYTES, _MERGE_BYTES = 326, 194
_HUGE_PAGE = 2 << 20  # cache and scratch that are at least so large come in whole ones (csrc/base/aligned_buffer.cc)
_CONTEXT_STEP = 256  # of the largest context: a multiple of it

Verdict = Literal["fits", "tight", "no"]


@dataclass(frozen=True)
class Memory:
    """Bytes. ``weights`` are mapped from the file: shared, and read again when dropped; the rest is private."""

    weights: int
    kv: int
    scratch: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.scratch + self.process

    @property
    def anonymous(self) -> int:
        """All that is not mapped from a file."""
        return self.total - self.weights


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        verdict: ``"fits"``, ``"tight"`` (less than 512 MiB would be left) or ``"no"``.
        machine: GiB of memory of the smallest common machine on which it fits; ``None``: on none.
        decode: tokens a second at the end of that context; ``None`` where no speed was measured.
    """

    quantisation: str
    kv_type: KvType
    context: int
    memory: Memory
    verdict: Verdict
    machine: int | None
    decode: float | None = None


@dataclass(frozen=True)
class Row:
    """One quantisation.

    Attributes:
        quantisation: a recipe's name, or ``"this file"``.
        bits: of a weight, on average.
        weights: bytes.
        largest: cache type -> most tokens of context that fit (not just tight), 0: none.
        prefill: tokens a second of a prompt of 512; ``None`` where no speed was measured.
    """

    quantisation: str
    bits: float
    weights: int
    largest: Mapping[KvType, int]
    prefill: float | None = None


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found.

    Attributes:
        shape: the model's sizes.
        available: bytes that may be used; ``ram``: of the machine asked about in bytes, ``None``: this one, now.
        threads: of the sessions planned for.
        rows: one a quantisation, the file's own first, then from large to small as given.
        cells: quantisation by cache type by context, in that order.
        speed: what was measured, or ``None``.
        advice: sentences for people.
    """

    shape: Shape
    available: int
    ram: int | None
    threads: int
    contexts: tuple[int, ...]
    kv_types: tuple[KvType, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    speed: Speed | None
    advice: tuple[str, ...]

    def cell(self, quantisation: str, context: int, kv_type: KvType = "f16") -> Cell:
        """One combination. Errors: ``KeyError`` when the plan has no such one."""
        for c in self.cells:
            if (c.quantisation, c.context, c.kv_type) == (quantisation, context, kv_type):
                return c
        raise KeyError((quantisation, context, kv_type))


def plan(
    model: str | os.PathLike[str],
    *,
    quantisations: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    kv_types: Sequence[KvType] | None = None,
    ram: int | None = None,
    threads: int = 0,
    speed: bool = False,
) -> Plan:
    """Memory (bytes) and speed (tokens a second) of a model, quantisation by context.

    Args:
        model: a GGUF file, a Hugging Face ``config.json`` (or its folder), a card of ``pyengine.shape.CARDS``, or
            ``hf:org/repo[:Q4_K_M]``, of which only the header is read (see :func:`pyengine.hub.outline`).
        quantisations: names such as ``"Q4_K_M"``; default: F16 down to Q2_K. A file's own row always comes first.
        contexts: tokens; default: 1k to 128k (k = 1024), as far as the model goes.
        kv_types: types of the cache; default: f16, and q8_0 where the model's heads allow it.
        ram: bytes of a machine to plan for, of which 2 GiB are left to its system; default: what is available here
            now, control groups included.
        threads: of a session; 0: one per usable physical core. A little of the scratch memory depends on it.
        speed: measure this machine, some 0.4 s for each format, and forecast tokens a second.

    Errors: ``InvalidArgument`` (unknown name, impossible value), ``FileError``, ``FormatError``, ``UnsupportedError``.
    """
    if not 0 <= threads <= MAX_THREADS:
        raise InvalidArgument(f"threads is {threads}; expected 0..{MAX_THREADS}", code="bad_option")
    threads = threads or default_threads()
    available = _available(ram)
    shape, own = _source(model)
    asked = _contexts(shape, contexts)
    kinds = _kv_types(shape, kv_types)
    chosen = [find_recipe(name).name for name in (QUANTISATIONS if quantisations is None else quantisations)]
    tables = ([(THIS_FILE, own)] if own else []) + [(n, _recipe_table(shape, n)) for n in dict.fromkeys(chosen)]
    if not tables:
        raise InvalidArgument("no quantisation was asked for", code="bad_option")

    planner = _Planner(shape, threads, available)
    works = {name: Work.of(table) for name, table in tables}
    measured = None
    if speed:
        formats = {f for work in works.values() for f in work.bytes}
        measured = measure(shape, formats, kinds, threads)
    rows, cells = [], []
    for name, table in tables:
        weights = sum(size for _, _, _, size in table)
        row = Row(
            quantisation=name,
            bits=8 * weights / sum(math.prod(dims) for _, dims, _, _ in table),
            weights=weights,
            largest={kv: planner.largest(weights, kv) for kv in kinds},
        )
        if measured is not None:
            row = dataclasses.replace(row, prefill=works[name].prefill(measured))
        rows.append(row)
        for kv in kinds:
            for context in asked:
                memory = planner.memory(weights, context, kv)
                rate = works[name].decode(measured, kv, memory.kv) if measured else None
                cells.append(Cell(name, kv, context, memory, planner.verdict(memory), machine_for(memory), rate))
    draft = Plan(shape, available, ram, threads, asked, kinds, tuple(rows), tuple(cells), measured, ())
    return dataclasses.replace(draft, advice=tuple(_advice(draft)))


def machine_for(memory: Memory) -> int | None:
    """GiB of the smallest common machine on which it fits."""
    needed = memory.total + MARGIN_BYTES + SYSTEM_BYTES
    return next((size for size in MACHINES if size * GIB >= needed), None)


# A table: (tensor, shape with rows first, format, bytes) of every tensor.
_Table = Sequence[tuple[str, tuple[int, ...], str, int]]


class _Planner:
    def __init__(self, shape: Shape, threads: int, available: int) -> None:
        self._shape, self._threads, self._available = shape, threads, available
        tokenizer = _TOKEN_BYTES * shape.vocab + _MERGE_BYTES * shape.merges
        self._process = _PROCESS_BYTES + tokenizer + 4 * shape.vocab  # and a row of logits

    def memory(self, weights: int, context: int, kv_type: KvType) -> Memory:
        kv, scratch = _session_bytes(self._shape, context, self._threads, kv_type)
        rounded = sum(-n % _HUGE_PAGE for n in (kv, scratch) if n >= _HUGE_PAGE)
        return Memory(weights, kv, scratch, self._process + rounded)

    def verdict(self, memory: Memory) -> Verdict:
        spare = self._available - memory.total
        return "no" if spare < 0 else "tight" if spare < MARGIN_BYTES else "fits"

    def largest(self, weights: int, kv_type: KvType) -> int:
        """The most tokens that fit: a multiple of 256, or the model's whole context."""

        def fits(context: int) -> bool:
            return self.verdict(self.memory(weights, context, kv_type)) == "fits"

        if fits(self._shape.context):
            return self._shape.context
        low, high = 0, self._shape.context // _CONTEXT_STEP + 1  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * _CONTEXT_STEP) else (low, middle)
        return low * _CONTEXT_STEP


def _session_bytes(shape: Shape, context: int, threads: int, kv_type: KvType) -> tuple[int, int]:
    return shape_bytes(
        n_ctx_train=shape.context,
        n_layers=shape.layers,
        n_embd=shape.embd,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        n_ff=shape.ff,
        n_ctx=context,
        threads=threads,
        kv_type=kv_type,
    )


def _source(model: str | os.PathLike[str]) -> tuple[Shape, _Table | None]:
    """The shape, and the table of a GGUF file."""
    if is_name(model):
        with outline(str(model)) as path:
            return _source(path)
    path = Path(model)
    if path.is_dir() or path.suffix == ".json":
        return from_config(path), None
    if not path.exists() and path.suffix != ".gguf" and path.name == str(model):
        return find_card(str(model)), None
    with Model.open(path, prefix_bytes=0, tokenizer_ahead=False) as opened:
        tensors = opened.file.tensors.values()
        table = [(t.name, tuple(reversed(t.dims)), t.type_name, t.size) for t in tensors]
        return of_model(opened, path.name), table


def _recipe_table(shape: Shape, name: str) -> _Table:
    return [
        (tensor, dims, fmt.name, synthetic.tensor_bytes(dims, fmt))
        for tensor, dims, fmt in synthetic.table(shape, name)
    ]


def _available(ram: int | None) -> int:
    if ram is not None:
        if ram <= SYSTEM_BYTES:
            raise InvalidArgument(
                f"ram is {ram / GIB:.3g} GiB; expected more than {SYSTEM_BYTES / GIB:.3g}, which its system is given",
                code="bad_option",
            )
        return ram - SYSTEM_BYTES
    here = available_memory()
    if here is None:
        raise UnsupportedError(
            "this system does not say how much memory is available: say for how much to plan (ram, --ram 16G)",
            code="unknown_memory",
        )
    return here


def _contexts(shape: Shape, contexts: Sequence[int] | None) -> tuple[int, ...]:
    if contexts is None:
        return tuple(c for c in CONTEXTS if c <= shape.context) or (shape.context,)
    if not contexts:
        raise InvalidArgument("no context was asked for", code="bad_option")
    for context in contexts:
        if not 1 <= context <= shape.context:
            raise InvalidArgument(
                f"a context of {context} tokens; expected 1..{shape.context}, what the model was made for",
                code="bad_option",
            )
    return tuple(sorted(set(contexts)))


def _kv_types(shape: Shape, kv_types: Sequence[KvType] | None) -> tuple[KvType, ...]:
    if kv_types is None:
        return ("f16", "q8_0") if shape.head_dim % 32 == 0 else ("f16",)
    for kv in kv_types:
        if kv not in KV_TYPES:
            raise InvalidArgument(f"a KV type is {kv!r}; expected {', '.join(KV_TYPES)}", code="bad_option")
    if not kv_types:
        raise InvalidArgument("no KV type was asked for", code="bad_option")
    return tuple(dict.fromkeys(kv_types))


def tokens(n: int) -> str:
    """``63k`` of 64512: k is 1024."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def gib(n: float) -> str:
    """Bytes in GiB: ``0.04``, ``4.58``, ``39.4``."""
    value = n / GIB
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def _advice(p: Plan) -> list[str]:
    advice = []
    best = _best(p)
    if best is None:
        least = min(p.cells, key=lambda c: c.memory.total)
        advice.append(
            f"Nothing fits: the least, {least.quantisation} with {tokens(least.context)} tokens and a {least.kv_type} "
            f"cache, needs {gib(least.memory.total)} GiB and {gib(p.available)} are available. "
            + (f"A machine with {least.machine} GiB runs it." if least.machine else "No common machine runs it.")
        )
    else:
        advice.append(
            f"{best.quantisation} is the largest that fits with {tokens(best.context)} tokens of context"
            f" ({best.kv_type} cache, {gib(best.memory.total)} GiB)."
        )
    longest = p.contexts[-1]
    last = p.rows[-1].quantisation
    if "f16" in p.kv_types and "q8_0" in p.kv_types:
        full = p.cell(last, longest, "f16").memory.kv
        saved = full - p.cell(last, longest, "q8_0").memory.kv
        advice.append(f"KV q8_0 saves {gib(saved)} of {gib(full)} GiB at {tokens(longest)} tokens (--kv-type q8_0).")
    if p.shape.group == 1 and "f16" in p.kv_types and p.cell(last, longest, "f16").memory.kv > 8 * GIB:
        each = p.cell(last, longest, "f16").memory.kv / longest / 1024
        advice.append(
            f"Its {p.shape.kv_heads} KV heads are not shared: every token of context costs {each:.0f} KiB, "
            "several times what models of this size usually need."
        )
    return advice


def _best(p: Plan) -> Cell | None:
    """What fits with 8k tokens (or the longest context below): most weights first, the plainer cache first."""
    enough = max((c for c in p.contexts if c <= 8192), default=p.contexts[0])
    order = {kv: i for i, kv in enumerate(p.kv_types)}
    fitting = [c for c in p.cells if c.verdict == "fits" and c.context == enough]
    return max(fitting, key=lambda c: (c.memory.weights, -order[c.kv_type]), default=None)
