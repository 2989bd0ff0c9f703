"""How fast a model runs here: prefill and decode in interleaved rounds, beside what the machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from pyengine import quant
from pyengine.errors import InvalidArgument
from pyengine.forecast import Work
from pyengine.machine import Limits, cpus, measure_limits
from pyengine.memory import available_memory
from pyengine.model import MAX_THREADS, KvType, Model, Session, default_threads

OnRound = Callable[[int, int, str], object]  # (round from 1, of how many, which variant)


def prompt(n: int, n_vocab: int) -> list[int]:
    """n ids that repeat no pattern, always the same."""
    return [(i * 7919 + 13) % n_vocab for i in range(n)]


@dataclass
class Row:
    """One figure: its values, a round each.

    Attributes:
        share: of a limit, in words; fraction: as a number, ``None`` where no limit is known.
        facts: what was measured, for programs.
    """

    name: str
    unit: str
    values: list[float] = field(default_factory=list)
    share: str = ""
    fraction: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass
class Report:
    """Figures with a title; ``limits`` has those of each number of threads, none where they were not measured."""

    title: str
    limits: dict[int, Limits] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, name: str, unit: str, **facts: Any) -> Row:
        self.rows.append(Row(name, unit, facts=facts))
        return self.rows[-1]

    def of_stream(self, row: Row, bytes_per_second: float, threads: int) -> None:
        """Beside the limit of reading."""
        limits = self.limits.get(threads)
        if limits:
            row.fraction = bytes_per_second / limits.read_bytes
            row.share = f"{bytes_per_second / 1e9:.1f} GB/s, {100 * row.fraction:.0f} % of the read stream"

    def of_arithmetic(self, row: Row, macs_per_second: float, threads: int, fmt: str) -> None:
        """Beside the limit of multiplying weights of a format."""
        limits = self.limits.get(threads)
        most = limits.macs(fmt) if limits else 0.0
        if limits and most:
            row.fraction = macs_per_second / most
            cycle = macs_per_second / limits.clock_hz / threads
            row.share = (
                f"{cycle:.1f} MAC/cycle/core, {100 * row.fraction:.0f} % of {most / macs_per_second * cycle:.0f}"
            )

    def lines(self, as_markdown: bool = False) -> list[str]:
        """For people."""
        cells = [["figure", "median", "spread", "unit", "share of the limit"]]
        for r in self.rows:
            cells.append([r.name, f"{r.median:.4g}", f"{min(r.values):.4g} .. {max(r.values):.4g}", r.unit, r.share])
        limits = [f"limits: {found.words()}" for found in self.limits.values()]
        made = [markdown(cells) if as_markdown else plain(cells)]
        if as_markdown:
            return [self.title, "", *(f"- {text}" for text in limits), *[""][: len(limits)], *made, *self.notes]
        return [self.title, *limits, "", *made, *self.notes]

    def json(self) -> dict[str, Any]:
        """For programs: every round's values."""
        rows = [asdict(row) | {"median": row.median} for row in self.rows]
        limits = [asdict(found) for found in self.limits.values()]
        return {"title": self.title, "limits": limits, "rows": rows, "notes": self.notes}


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def plain(cells: Sequence[Sequence[str]], right: bool = False) -> str:
    """The same in columns."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    adjust = str.rjust if right else str.ljust
    return "\n".join("  ".join(adjust(c, w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def interleave(rounds: int, variants: Mapping[str, Callable[[], None]], on_round: OnRound | None = None) -> None:
    """Runs every variant once a round, so that a change of the machine meets them all.

    Every second round goes backwards: neighbours change places, so that none always meets what another leaves behind.
    """
    for i in range(rounds):
        for name, run in list(variants.items())[:: -1 if i % 2 else 1]:
            if on_round is not None:
                on_round(i + 1, rounds, name)
            run()


def timed(f: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prefill: tokens of the prompts; decode: tokens generated, 0: none; depths: tokens in the context before them.
        threads: numbers of threads, 0: the default; kv_types: of the cache.
        rounds: each of which does everything once.
    """

    prefill: tuple[int, ...] = (512,)
    decode: int = 32
    depths: tuple[int, ...] = (0,)
    threads: tuple[int, ...] = (0,)
    kv_types: tuple[KvType, ...] = ("f16",)
    rounds: int = 5

    def check(self, model: Model) -> None:
        """Errors: ``InvalidArgument``: what cannot be measured, with what can."""
        context = model.n_ctx_train
        for name, values, low in (("prompt", self.prefill, 1), ("depth", self.depths, 0)):
            for n in values:
                most = context - (self.decode if name == "depth" else 0)
                if not low <= n <= most:
                    raise InvalidArgument(f"a {name} of {n} tokens; expected {low}..{most}", code="bad_option")
        for n in self.threads:
            if not 0 <= n <= MAX_THREADS:
                raise InvalidArgument(f"threads is {n}; expected 0..{MAX_THREADS}", code="bad_option")
        if not 0 <= self.decode < context:
            raise InvalidArgument(f"{self.decode} tokens to decode; expected 0..{context - 1}", code="bad_option")
        if not 1 <= self.rounds <= 1000:
            raise InvalidArgument(f"{self.rounds} rounds; expected 1..1000", code="bad_option")
        if not self.prefill and not self.decode:
            raise InvalidArgument("neither a prompt nor tokens to decode: nothing to measure", code="bad_option")
        available = available_memory()
        needed = sum(sum(model.session_bytes(n, threads=t, kv_type=kv)) for t, kv, n in self._sessions())
        if available is not None and needed > available:
            raise InvalidArgument(
                f"the sessions need {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} are available: "
                "ask for less depth, fewer numbers of threads or --kv-type q8_0",
                code="no_memory",
            )

    def _sessions(self) -> list[tuple[int, KvType, int]]:
        """(threads, cache, positions) of all that are open at a time."""
        lengths = [max(self.prefill)] if self.prefill else []
        lengths += [depth + self.decode for depth in self.depths] if self.decode else []
        return [(t, kv, n) for t in self.threads for kv in self.kv_types for n in lengths]


def bench(
    model: Model,
    plan: Plan,
    title: str,
    *,
    limits: bool = True,
    on_round: OnRound | None = None,
    on_session: Callable[[Session], object] | None = None,
) -> Report:
    """Measures ``plan`` and says how near the machine's limits that comes.

    ``on_session`` gets every session, so that another thread can cancel them.

    Errors: ``InvalidArgument`` (see :meth:`Plan.check`), ``OutOfMemory``.
    """
    plan.check(model)
    counts = tuple(dict.fromkeys(t or default_threads() for t in plan.threads))
    report = Report(title, {t: measure_limits(t) for t in counts} if limits else {})
    most = cpus().threads
    if max(counts) > most:
        report.notes.append(f"{max(counts)} threads on {most} CPUs: they take turns, and nothing here is comparable.")
    work = Work.of_model(model)
    main_format = max(work.products, key=lambda name: work.products[name])
    with ExitStack() as stack:
        runs: dict[str, Callable[[], None]] = {}

        def opened(n_ctx: int, threads: int, kv: KvType) -> Session:
            session = stack.enter_context(model.session(n_ctx=n_ctx, threads=threads, kv_type=kv))
            if on_session is not None:
                on_session(session)
            return session

        finish: list[Callable[[], None]] = []

        def add_prefill(n: int, threads: int, kv: KvType, session: Session, name: str) -> None:
            row = report.row(name, "tokens/s", kind="prefill", tokens=n, threads=threads, kv_type=kv)

            def run() -> None:
                session.truncate(0)
                row.values.append(n / timed(lambda: session.eval(prompt(n, model.n_vocab))))

            runs[name] = run
            finish.append(
                lambda: report.of_arithmetic(row, work.prompt_products(n) * row.median / n, threads, main_format)
            )

        def add_decode(depth: int, threads: int, kv: KvType, name: str) -> None:
            session = opened(depth + plan.decode, threads, kv)
            facts = {"kind": "decode", "tokens": plan.decode, "depth": depth, "threads": threads, "kv_type": kv}
            row = report.row(name, "tokens/s", **facts)
            ids = prompt(depth + plan.decode, model.n_vocab)
            position = model.session_bytes(n_ctx=1024, kv_type=kv)[0] / 1024

            def run() -> None:
                if len(session) < depth:  # the first time; from another session, if one got so far
                    kept = session.reuse(ids[: depth + 1])
                    if kept < depth:
                        session.prefill(ids[kept:depth])
                session.truncate(depth)
                row.values.append(plan.decode / timed(lambda: [session.eval([i]) for i in ids[depth:]]))

            runs[name] = run
            finish.append(
                lambda: report.of_stream(
                    row, (work.total_bytes + position * (depth + plan.decode / 2)) * row.median, threads
                )
            )

        for threads in counts:
            for kv in plan.kv_types:
                what = f", {threads} threads" if len(counts) > 1 else ""
                what += f", {kv} cache" if len(plan.kv_types) > 1 else ""
                if plan.prefill:
                    session = opened(max(plan.prefill), threads, kv)
                    for n in plan.prefill:
                        add_prefill(n, threads, kv, session, f"prefill {n}{what}")
                for depth in plan.depths if plan.decode else ():
                    add_decode(depth, threads, kv, f"decode {plan.decode} after {depth}{what}")
        opened(2, max(counts), "f16").eval(
            prompt(2, model.n_vocab)
        )  # every page of the file is there before anything is timed
        interleave(plan.rounds, runs, on_round)
        for each in finish:
            each()
    return report


def default_title(what: str, rounds: int) -> str:
    """What runs where."""
    return f"{what}, {quant.tier_active()}, {rounds} rounds, interleaved"
