"""Is this machine in order for the engine, and how fast can it be: what ``pyengine-doctor`` finds (docs/doctor.md)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import pyengine
from pyengine import machine, quant
from pyengine.bench import plain
from pyengine.errors import EngineError
from pyengine.forecast import Speed, measure
from pyengine.machine import Cpus, Limits, cpus
from pyengine.memory import available_memory, total_memory
from pyengine.model import KV_TYPES, Model, default_threads
from pyengine.shape import find_card, of_model
from pyengine.synthetic import random_blocks

GIB = 1 << 30
REFERENCE = "r1-distill-llama-8b"  # the shape whose speed is told where no model is given
REFERENCE_FORMATS = ("Q4_K", "Q6_K", "Q8_0")
QUESTION = "What is 2 + 3?"  # a model's template is shown with it
_SLOW = 0.5  # of reading: below, something is worth saying of a format
_SIMPLE = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K"})  # hardly anything to decode

Tell = Callable[[str], object]  # what is being done now


@dataclass(frozen=True)
class Check:
    """One thing that was compared; ``detail`` says what was found."""

    name: str
    good: bool
    detail: str


@dataclass(frozen=True)
class Kernel:
    """How one format of weights runs: bytes a second of a token, multiplications a second of a prompt; share of the
    limits, ``None`` where they are not known."""

    format: str
    bytes_per_second: float
    macs_per_second: float
    of_reading: float
    of_arithmetic: float | None


@dataclass(frozen=True)
class ModelReport:
    """A model, as a chat with it would begin.

    Attributes:
        prompt: the template with one question; ids: its tokens; pieces: their texts; bos: how many of them are BOS.
        problem: why there is no prompt, or "".
    """

    name: str
    arch: str
    formats: dict[str, int]  # format -> bytes
    context: int
    notes: list[str]
    template: str = ""
    prompt: str = ""
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    bos: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found."""

    version: str
    epoch: int
    tiers: list[str]
    tier: str
    forced: bool
    checks: list[Check]
    cpus: Cpus
    threads: int
    load: float | None  # of the last minute, in CPUs
    limits: Limits | None
    kernels: list[Kernel]
    cache: dict[str, float]  # cache type -> bytes a second
    memory_total: int | None
    memory_available: int | None
    model: ModelReport | None
    advice: list[str]

    @property
    def healthy(self) -> bool:
        """Whether every check is good."""
        return all(check.good for check in self.checks)


def diagnose(
    path: str | os.PathLike[str] | None = None, *, speed: bool = True, tell: Tell = lambda _: None
) -> Diagnosis:
    """Checks kernels against the specification, measures the machine and looks at a model.

    Args:
        path: a GGUF file, or nothing.
        speed: measure limits and kernels (some five seconds).
        tell: called with what is being done.

    Errors: those of ``Model.open``; ``CpuError`` when PYENGINE_ISA names a tier that is not there.
    """
    tier, threads, here = quant.tier_active(), default_threads(), cpus()
    tell("comparing kernels with the specification")
    checks = check_kernels(tier)
    tell("comparing whole answers")
    checks += check_answers()
    model, shape = None, find_card(REFERENCE)
    formats: tuple[str, ...] = REFERENCE_FORMATS
    needed = 0
    if path is not None:
        tell("opening the model")
        with Model.open(path) as opened:
            model = look_at(opened, Path(path).name)
            shape = of_model(opened, Path(path).name)
            formats = tuple(_main_formats(model))
            needed = opened.weight_bytes + sum(opened.session_bytes())
            if model.ids:
                checks.append(_check_bos(opened, model))
    limits = None
    kernels: list[Kernel] = []
    measured: Speed | None = None
    if speed:
        tell("measuring memory and arithmetic")
        limits = machine.measure_limits(threads)
        tell("timing the engine")
        measured = measure(shape, formats, ["f16"], threads)
        kernels = [_kernel(name, measured, limits) for name in formats]
    available = available_memory()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = Diagnosis(
        version=pyengine.__version__,
        epoch=pyengine.numerics_epoch(),
        tiers=quant.tiers(),
        tier=tier,
        forced=bool(os.environ.get("PYENGINE_ISA")),
        checks=checks,
        cpus=here,
        threads=threads,
        load=load,
        limits=limits,
        kernels=kernels,
        cache={str(kv): rate for kv, rate in measured.cache.items()} if measured else {},
        memory_total=total_memory(),
        memory_available=available,
        model=model,
        advice=[],
    )
    found.advice.extend(advise(found, needed))
    return found


# --- self-test ------------------------------------------------------------------------------------------------------


def check_kernels(tier: str) -> list[Check]:
    """Every format's linear operation and every cache type's attention, a tier against scalar: the same bits."""
    rng = np.random.default_rng(1)
    rows, cols = 67, 512
    checks = []
    for name, fmt in quant.FORMATS.items():
        weights = random_blocks(rng, rows * cols // fmt.block_size, 0.05, name).reshape(-1)
        different = compared = 0
        for tokens in (1, 3, 9, 64):
            x = rng.standard_normal((tokens, cols), np.float32)
            ours = quant.linear(tier, name, weights, rows, cols, x)
            scalar = quant.linear("scalar", name, weights, rows, cols, x)
            different += int((ours.view(np.uint32) != scalar.view(np.uint32)).sum())
            compared += ours.size
        checks.append(_compared(f"linear {name}", different, compared))
    for kv, kind in KV_TYPES.items():
        different = compared = 0
        shapes: tuple[tuple[int, int, int], ...] = ((1, 1, 64), (255, 4, 64), (700, 8, 128))
        for n_keys, heads, dim in shapes:
            k, v = (quant.quantise(kv, rng.standard_normal((n_keys, dim), np.float32)).reshape(-1) for _ in range(2))
            q = rng.standard_normal((heads, dim), np.float32)
            ours, scalar = (quant.attend(t, kind, k, v, n_keys, q) for t in (tier, "scalar"))
            different += int((ours.view(np.uint32) != scalar.view(np.uint32)).sum())
            compared += ours.size
        checks.append(_compared(f"attention {kv}", different, compared))
    return checks


def _compared(name: str, different: int, compared: int) -> Check:
    detail = f"{compared} values" if not different else f"{different} of {compared} values differ from scalar"
    return Check(name, not different, detail)


_ANSWER = """
import sys
from pyengine.doctor import answer
print(answer(int(sys.argv[1]), int(sys.argv[2])))
"""


def answer(threads: int, chunk: int) -> str:
    """A hash of the demo model's logits for some tokens, by the tier in use."""
    with Model.open(pyengine.demo_model_path(), tokenizer_ahead=False) as model:
        ids = [(7 * i + 3) % model.n_vocab for i in range(24)]
        with model.session(n_ctx=32, threads=threads, chunk=chunk) as session:
            rows = session.eval(ids[:16], all_logits=True)
            more = [session.eval([i]) for i in ids[16:]]
    return hashlib.sha256(b"".join([rows.tobytes(), *(row.tobytes() for row in more)])).hexdigest()


def check_answers() -> list[Check]:
    """The demo model's logits by scalar code on one thread, and by the tier in use on several: the same bits."""
    environment = os.environ | {"PYENGINE_ISA": "scalar"}
    command = [sys.executable, "-c", _ANSWER, "1", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Check("answers", False, f"the scalar run failed: {last}")]
    scalar = done.stdout.strip()
    checks = []
    for threads in dict.fromkeys((1, default_threads(), default_threads() + 1)):
        good = answer(threads, 7) == scalar
        detail = "24 tokens, all logits" if good else "the logits differ from scalar's"
        checks.append(Check(f"answers, {threads} thread{'s' if threads > 1 else ''}", good, detail))
    return checks


# --- a model --------------------------------------------------------------------------------------------------------


def look_at(model: Model, name: str) -> ModelReport:
    """What a chat with it would begin with."""
    formats: dict[str, int] = {}
    for tensor in model.file.tensors.values():
        if len(tensor.dims) > 1:
            formats[tensor.type_name] = formats.get(tensor.type_name, 0) + tensor.size
    known: dict[str, Any] = {
        "name": str(model.metadata.get("general.name", name)),
        "arch": model.architecture,
        "formats": dict(sorted(formats.items(), key=lambda item: -item[1])),
        "context": model.n_ctx_train,
        "notes": model.notes,
    }
    try:
        from pyengine.chat import ChatTemplate, build_prompt

        tokenizer = model.tokenizer
        template = ChatTemplate.from_metadata(model.metadata, tokenizer)
        prompt = build_prompt(template, tokenizer, [{"role": "user", "content": QUESTION}])
    except EngineError as error:
        return ModelReport(**known, problem=error.message)
    return ModelReport(
        **known,
        template=template.origin,
        prompt=prompt.text,
        ids=prompt.ids,
        pieces=[tokenizer.piece(i) for i in prompt.ids],
        bos=sum(i == tokenizer.bos_id for i in prompt.ids),
    )


def _check_bos(model: Model, report: ModelReport) -> Check:
    wants = model.tokenizer.add_bos
    good = report.bos == 1 if wants else report.bos <= 1
    expected = "one" if wants else "at most one"
    return Check("beginning of the prompt", good, f"{report.bos} BOS where {expected} is expected")


def _main_formats(report: ModelReport) -> list[str]:
    """Those that make up nearly all of the model."""
    total = sum(report.formats.values())
    return [name for name, size in report.formats.items() if size > 0.03 * total]


# --- speed and advice -----------------------------------------------------------------------------------------------


def _kernel(name: str, speed: Speed, limits: Limits) -> Kernel:
    most = limits.macs(name)
    return Kernel(
        name,
        speed.stream[name],
        speed.products[name],
        speed.stream[name] / limits.read_bytes,
        speed.products[name] / most if most else None,
    )


def advise(d: Diagnosis, needed: int) -> list[str]:
    """What would be slow or wrong, and why. ``needed``: bytes a chat with the model takes, 0: no model."""
    said = []
    if not d.healthy:
        said.append(
            "Kernels do not compute what the specification says: a defect of the processor, the memory or this build. "
            "Please report it; PYENGINE_ISA=scalar is slow but right if the checks of that are good."
        )
    best = d.tiers[-1]
    if d.tier != best:
        said.append(f"PYENGINE_ISA forces {d.tier}: {best} would be quicker, with the same bits.")
    elif d.tier == "scalar":
        said.append("This processor has no AVX2: everything runs in plain C++, several times slower than it could.")
    said += _about_cpus(d)
    said += _about_speed(d)
    if d.memory_available is not None:
        if needed > d.memory_available:
            said.append(
                f"The model needs {needed / GIB:.1f} GiB with a short context and {d.memory_available / GIB:.1f} are "
                "available: its weights would be read from the disk again and again, some hundred times slower. "
                "pyengine-plan shows what fits."
            )
        elif d.memory_available < 2 * GIB:
            said.append(
                f"Only {d.memory_available / GIB:.1f} GiB of memory are available: close something, or run less."
            )
    if d.model is not None and d.model.problem:
        said.append(f"Chat will not work as it is: {d.model.problem}")
    return said


def _about_cpus(d: Diagnosis) -> list[str]:
    said = []
    c = d.cpus
    if c.quota and c.quota < c.performance:
        said.append(
            f"A control group grants {c.quota:g} CPUs of {c.cores} cores: {d.threads} threads are started, and no "
            "setting here gets more."
        )
    if c.performance < c.cores:
        said.append(
            f"{c.performance} of {c.cores} cores are of the fast kind: threads are for those alone, because at every "
            f"step all wait for the slowest (--threads {c.cores} tries the others, too)."
        )
    if _busy(d):
        said.append(
            f"On average {d.load:.1f} threads of other programs wanted to run in the last minute: speeds here are "
            "lower than they could be, and change from moment to moment."
        )
    return said


def _busy(d: Diagnosis) -> bool:
    """Whether other programs leave fewer CPUs than there are threads."""
    return d.load is not None and d.load > 0.5 and d.load + d.threads > d.cpus.threads + 0.5


def _about_speed(d: Diagnosis) -> list[str]:
    said = []
    for k in d.kernels:
        if k.of_reading < _SLOW and k.format not in _SIMPLE and not _busy(d):
            said.append(
                f"{k.format} is read at {k.bytes_per_second / 1e9:.1f} GB/s, {100 * k.of_reading:.0f} % of what memory "
                "gives: one token at a time it is held up by arithmetic. A file in Q4_K_M or Q4_0 may be quicker."
            )
    if d.limits is not None:
        if d.limits.barrier_seconds > 20e-6:
            said.append(
                f"Threads need {d.limits.barrier_seconds * 1e6:.0f} us to meet, usually one or less: others run on "
                "these cores, or there are more threads than cores."
            )
        if d.limits.read_highest > 1.5 * d.limits.read_lowest:
            said.append(
                f"Memory gave from {d.limits.read_lowest / 1e9:.0f} to {d.limits.read_highest / 1e9:.0f} GB/s within a "
                "second: it is shared with others, and speeds will vary as much."
            )
    return said


def lines(d: Diagnosis) -> list[str]:
    """For people."""
    tiers = ", ".join(f"[{t}]" if t == d.tier else t for t in d.tiers)
    bad = [c for c in d.checks if not c.good]
    out = [
        f"pyengine {d.version}, numerics epoch {d.epoch}",
        f"instruction sets   {tiers}{' (forced by PYENGINE_ISA)' if d.forced else ''}",
        f"self-test          {len(d.checks)} checks, {len(bad)} failed",
        *(f"  FAILED {c.name}: {c.detail}" for c in bad),
        f"processor          {_cpus(d)}",
    ]
    if d.limits is not None:
        out.append(f"limits             {d.limits.words()}")
    if d.kernels:
        of = d.model.name if d.model else REFERENCE
        out += ["", f"Speed of the engine with the shape of {of}, {d.threads} threads"]
        cells = [["", "a token: GB/s", "of reading", "a prompt: GMAC/s", "of arithmetic"]]
        for k in d.kernels:
            arithmetic = "" if k.of_arithmetic is None else f"{100 * k.of_arithmetic:.0f} %"
            cells.append(
                [
                    k.format,
                    f"{k.bytes_per_second / 1e9:.1f}",
                    f"{100 * k.of_reading:.0f} %",
                    f"{k.macs_per_second / 1e9:.0f}",
                    arithmetic,
                ]
            )
        cells += [[f"KV {kv}", f"{rate / 1e9:.1f}", "", "", ""] for kv, rate in d.cache.items()]
        out += plain(cells, right=True).splitlines()
    if d.memory_total is not None and d.memory_available is not None:
        out += ["", f"memory             {d.memory_available / GIB:.1f} GiB available of {d.memory_total / GIB:.1f}"]
    if d.model is not None:
        out += ["", *_model_lines(d.model)]
    out += ["", *(f"- {sentence}" for sentence in d.advice or ["Nothing stands out."])]
    return out


def _cpus(d: Diagnosis) -> str:
    c = d.cpus
    text = f"{c.cores} cores, {c.threads} hardware threads"
    if c.performance < c.cores:
        text += f", {c.performance} cores of the fast kind"
    if c.quota:
        text += f", control groups grant {c.quota:g} CPUs"
    return f"{text}; {d.threads} threads by default"


def _model_lines(m: ModelReport) -> list[str]:
    total = sum(m.formats.values())
    formats = ", ".join(f"{name} {100 * size / total:.0f} %" for name, size in m.formats.items())
    out = [f"{m.name}: {m.arch}, context {m.context}", f"matrices: {formats}"]
    out += [f"note: {note}" for note in m.notes]
    if m.problem:
        return [*out, f"no prompt: {m.problem}"]
    pairs = "  ".join(f"{i} {text!r}" for i, text in zip(m.ids, m.pieces, strict=True))
    return [
        *out,
        f"template: {m.template}; {QUESTION!r} becomes {len(m.ids)} tokens, {m.bos} of them BOS:",
        f"  {m.prompt!r}",
        f"  {pairs}",
    ]


def report(d: Diagnosis) -> dict[str, Any]:
    """For programs."""
    return asdict(d) | {"healthy": d.healthy}
