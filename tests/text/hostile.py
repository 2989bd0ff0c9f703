"""Hostile text: templates that loop, explode or reach for attributes; special strings in content; long runs.

``python -m tests.text.hostile`` (``make hostile-text``) does all of it and prints what it did; a share runs in
``test_hostile.py``. Each check yields a sentence for every failure, so that the full run lists them all.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyengine.chat import BUILTIN_TEMPLATES, ChatTemplate, build_prompt
from pyengine.errors import EngineError, FormatError, UnsupportedError
from pyengine.reasoning import ReasoningSplitter
from pyengine.stops import StopMatcher
from pyengine.template import MAX_SOURCE, Template
from pyengine.tokenizer import Tokenizer
from tests.support import DATA
from tests.text.vocabularies import HF_TOKENIZERS, from_hf, vocabulary

# --- templates --------------------------------------------------------------------------------------------------------

STEPS, CHARS = 110_000, 4 << 20  # of a conversation of one message
MEMORY = 96 << 20  # bytes
SECONDS = 1.0  # of processor time; 0.1 is what is aimed at, on any machine of these years it is under that by far

_OFTEN = "{% for j in range(99) %}{% for i in range(9999) %}", "{% endfor %}{% endfor %}"


def often(body: str, before: str = "") -> str:
    return before + _OFTEN[0] + body + _OFTEN[1]


def grow(start: str, step: str, use: str = "{{ ns.x }}") -> str:
    before = f"{{% set ns = namespace(x={start}) %}}"
    return before + f"{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}" + use


TEMPLATES: dict[str, str] = {
    # loops
    "nested loops": often(""),
    "nested loops that print": often("{{ i }}"),
    "nested loops that add": often("{{ i + 1 }}"),
    "loop variables": often("{{ loop.revindex }}{{ loop.previtem }}"),
    "loop over a text": "{% for c in 'a' * 4000000 %}{% endfor %}",
    "filtered loops": "{% for a in range(9999) if a is odd %}" * 2 + "{% endfor %}" * 2,
    "loops over repeated lists": "{% for m in messages * 9999 %}{% for n in messages * 9999 %}{% endfor %}{% endfor %}",
    "ranges": often("{{ range(99999) | length }}"),
    "a large range": "{{ range(1000000000) | list }}",
    "a range of long numbers": "{{ range(0, 10 ** 18) | list }}",
    "tests": often("{% if i is odd and i is divisibleby 3 %}{% endif %}"),
    "filters": often("{{ 'ab' | list | join | upper | lower | trim | length }}"),
    "json": often("{{ [[[[i]]]] | tojson(indent=16) }}"),
    "dates": often("{{ strftime_now('%Y %B %A %c') }}"),
    "sorting": often("{% set q = l | sort(reverse=true) %}", "{% set l = range(900) | list %}"),
    "sorting texts that begin alike": often("{% set q = l | sort %}", "{% set l = ['a' * 4000] * 500 %}"),
    "copies of a dict": often("{% set q = dict(l) %}", "{% set l = [[1, 2]] * 9000 %}"),
    "copies in namespaces": often("{% set q = namespace(l) %}", "{% set l = [[1, 2]] * 9000 %}"),
    "first of a long list": often("{% set q = l | first %}", "{% set l = range(9000) | list %}"),
    "comparing lists": often("{{ l == k }}", "{% set l = range(9000) | list %}{% set k = range(9000) | list %}"),
    "names from far away": "{% with a = 1 %}" * 90 + often("{{ nothing }}") + "{% endwith %}" * 90,
    # searching: quadratic in Python where it is done from the right, or for a set of characters
    "rfind": "{{ ('a' * 1000000).rfind('ab' ~ 'a' * 500000) }}",
    "rsplit": "{{ ('a' * 1000000).rsplit('ab' ~ 'a' * 500000) }}",
    "rpartition": "{{ ('a' * 1000000).rpartition('ab' ~ 'a' * 500000) }}",
    "strip": "{{ ('a' * 1000000).strip('b' * 500000 ~ 'a') }}",
    "trim": "{{ ('a' * 1000000) | trim('b' * 500000 ~ 'a') }}",
    "in, short texts": often("{{ n in h }}", "{% set h = 'a' * 2400 %}{% set n = 'b' ~ 'a' * 1200 %}"),
    "in, long texts": often("{{ n in h }}", "{% set h = 'a' * 29000 %}{% set n = 'b' ~ 'a' * 98 %}"),
    "count": often("{{ h.count(n) }}", "{% set h = 'a' * 29000 %}{% set n = 'b' ~ 'a' * 98 %}"),
    "replace": often("{{ h.replace(n, '') }}", "{% set h = 'a' * 29000 %}{% set n = 'b' ~ 'a' * 98 %}"),
    "is lower": often("{% if s is lower %}{% endif %}", "{% set s = 'a' * 1000000 %}"),
    "is upper": often("{% if s is upper %}{% endif %}", "{% set s = 'A' * 1000000 %}"),
    "many beginnings": often("{{ 'a'.startswith(p) }}", "{% set p = ('q', 'r', 's') + ('t',) %}"),
    "a long attribute": "{% set a = 'a' * 1000000 %}{{ range(9999) | map(attribute=a) | list | length }}",
    "a dotted attribute": "{% set a = '.' * 1000000 %}{{ range(9999) | map(attribute=a) | list | length }}",
    # recursion
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    "two macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro by default": "{% macro f(a=f()) %}{% endmacro %}{% set g = f %}{{ f(f(f(f()))) }}" + often("{{ f(1) }}"),
    "callers": "{% macro f() %}{{ caller() }}{% endmacro %}" + often("{% call f() %}a{% endcall %}"),
    "callers of callers": "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}"
    "{% call f() %}a{% endcall %}",
    "a recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a list of itself": grow("[1]", "[ns.x, ns.x]"),
    "a dict of itself": grow("{}", "{'a': ns.x, 'b': ns.x}"),
    "a list of itself as json": grow("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
    "a list of itself compared": grow("[1]", "[ns.x, ns.x]", "{{ ns.x == ns.x }}"),
    # memory
    "a repeated text": "{{ 'a' * 1000000000 }}",
    "a repeated text, backwards": "{{ 1000000000 * 'a' }}",
    "a repeated list": "{{ ([1] * 1000000000) | length }}",
    "text doubled": grow("'aaaa'", "ns.x ~ ns.x"),
    "text added": grow("'aaaa'", "ns.x + ns.x"),
    "text replaced": grow("'aaaa'", "ns.x.replace('a', ns.x)"),
    "text joined": grow("'aaaa'", "ns.x.join([ns.x] * 9)"),
    "text captured": "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 99,
    "lists doubled": grow("[1]", "ns.x + ns.x"),
    "lists multiplied": grow("[1]", "ns.x * 99"),
    "a wide indent": grow("'a\n'", "(ns.x * 9) | indent('b' * 9999)"),
    "indented json": grow("[1]", "[ns.x]", "") + "{% for i in range(9999) %}{{ ns.x | tojson(indent=16) }}{% endfor %}",
    "json with long separators": "{{ range(900) | list | tojson(separators=('a' * 1000000, ':')) }}",
    "json with escapes": often("{{ s | tojson(ensure_ascii=true) }}", "{% set s = '\U0001f469' * 100000 %}"),
    "empty text replaced": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "text split into characters": "{{ ('a ' * 2000000).split() | length }}",
    "lines": "{{ ('\n' * 4000000).splitlines() | length }}",
    "format widths": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "the format filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "wordwrap": "{{ ('a' * 1000000) | wordwrap(1) }}",
    "lipsum": "{{ lipsum(1000000) }}",
    "a long date": "{{ strftime_now('%999999999d' * 99) }}",
    "powers": "{{ 10 ** 10 ** 10 }}",
    "products": "{{ 2 ** 62 * 2 ** 62 }}",
    "shifts by multiplication": grow("2", "ns.x * ns.x"),
    # what the parser has to survive
    "a long decimal number": "{{ " + "9" * 20000 + " }}",
    "a long hexadecimal number": "{{ 0x" + "f" * 60000 + " }}",
    "a long binary number": "{% set x = 0b" + "1" * 60000 + " %}" + often("{{ x % 7 }}"),
    "signs": "{{ " + "-" * 50000 + "1 }}",
    "nots": "{{ " + "not " * 15000 + "1 }}",
    "parentheses": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "brackets": "{{ " + "[" * 30000 + "]" * 30000 + " }}",
    "braces": "{" * 60000,
    "sums": "{{ 1" + "+1" * 8000 + " }}",
    "attributes of attributes": "{{ x" + ".a" * 8000 + " }}",
    "calls of calls": "{{ x" + "()" * 8000 + " }}",
    "filters of filters": "{{ 'a'" + "|trim" * 4000 + " }}",
    "conditions": "{{ 1" + " if 1 else 1" * 5000 + " }}",
    "blocks in blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "loops in loops": "{% for a in b %}" * 2000 + "{% endfor %}" * 2000,
    "many small expressions": "{{((((((((((1))))))))))}}" * 2600,
    "many calls": "{{a(b(c(d())))}}" * 4000,
    "many prints": "{{1}}" * 13000,
    "an open text": "{{ '" + "\\" * 60000,
    "open tags": "{%" * 30000,
    "too long": "x" * (MAX_SOURCE + 1),
    # other templates, and what a sandbox would have to forbid
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('true') }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__globals__.os }}",
    "a method's self": "{{ ''.upper.__self__.__class__ }}",
    "a namespace's class": "{{ namespace().__class__.__base__ }}",
    "the loop's class": "{% for a in [1] %}{{ loop.__class__.__init__ }}{% endfor %}",
    "the attr filter": "{{ ('' | attr('__class__')).x }}",
    "attributes through map": "{{ ([''] | map(attribute='__class__') | first).x }}",
    "attributes through format": "{{ '{0.__class__.__init__.__globals__}'.format('') }}",
    "the undefined's class": "{{ nothing.__class__ }}",
    "printing a function": "{{ ''.upper }}",
    "printing a namespace": "{{ namespace(a=1) }}",
    "printing the loop": "{% for a in [1] %}{{ loop }}{% endfor %}",
    "json of a function": "{{ [''.upper] | tojson }}",
    "assigning into a list": "{% do messages.append(1) %}",
    "assigning into a message": "{% set messages[0].role = 'system' %}",
    "self": "{{ self.__init__ }}",
    "cycler": "{{ cycler('a').next() }}",
}
_CODES = ("template_limit", "template_syntax", "template_error")


def check_template(source: str) -> str:
    """What is wrong with how a hostile template ends; "" if nothing."""
    start = time.process_time()
    try:
        try:
            text = Template(source).render({"messages": [{"role": "user", "content": "Hi"}]}, steps=STEPS, chars=CHARS)
            return f"it renders to {text[:40]!r} of {len(text)} characters"
        except (UnsupportedError, FormatError) as error:
            seconds = time.process_time() - start
            if error.code not in _CODES or len(error.message) > 1000:
                return f"it ends in {error.code} with a message of {len(error.message)} characters"
        if seconds > SECONDS:
            return f"it took {seconds:.2f} s"
        tracemalloc.start()
        with contextlib.suppress(EngineError):
            Template(source).render({"messages": [{"role": "user", "content": "Hi"}]}, steps=STEPS, chars=CHARS)
        peak = tracemalloc.get_traced_memory()[1]
        return f"it needed {peak >> 20} MiB" if peak > MEMORY else ""
    except Exception as error:
        return f"it escapes as {type(error).__name__}: {str(error)[:100]}"
    finally:
        tracemalloc.stop()


# --- special strings in content ---------------------------------------------------------------------------------------

MARKED = ("r1-distill-qwen", "qwen3", "llama-bpe")
ROLES = ("system", "user", "assistant", "tool")
# How a marker stands in the content of a message; the halves go to this message and to the next one.
POSITIONS: dict[str, Callable[[str], tuple[str, str]]] = {
    "alone": lambda m: (m, "x"),
    "start": lambda m: (f"{m} x", "x"),
    "middle": lambda m: (f"a{m}b", "x"),
    "end": lambda m: (f"x {m}", "x"),
    "twice": lambda m: (m + m, "x"),
    "after its own beginning": lambda m: (m[:-1] + m, "x"),
    "inside itself": lambda m: (m[: len(m) // 2] + m + m[len(m) // 2 :], "x"),
    "split over two messages": lambda m: (m[: len(m) // 2], m[len(m) // 2 :]),
    "all but its end": lambda m: (m[:-1], m[-1:]),
    "in reasoning": lambda m: (f"<think>\n{m} r\n</think>\n\na", "x"),
    "with an accent": lambda m: (m + "\u0301", "x"),
}


def tokenizer_named(name: str) -> Tokenizer:
    return from_hf(name) if name in HF_TOKENIZERS else vocabulary(name)


def template_sources() -> dict[str, str]:
    """Every published template there is, and the built-in ones."""
    published = {path.name: path.read_bytes().decode() for path in sorted((DATA / "templates").glob("*.jinja"))}
    return published | {f"built in {name}": source for name, source in BUILTIN_TEMPLATES.items()}


def conversation(role: str, first: str, second: str, reasoning: str | None = None) -> list[dict[str, Any]]:
    """All four roles; what stands in the first and second message of one of them is given."""
    said = {r: ["s", "t"] for r in ROLES} | {role: [first, second]}
    messages = []
    order = ("system", "user", "assistant", "tool", "tool", "assistant", "user")
    for turn, r in zip((0, 0, 0, 0, 1, 1, 1), order, strict=True):
        message = {"role": r, "content": said[r][turn]}
        if r == "assistant" and reasoning is not None:
            message["reasoning_content"] = reasoning
        messages.append(message)
    if role == "system":
        messages.insert(1, {"role": "system", "content": second})
    return messages


def control_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    return [token for token in ids if tokenizer.is_control(token)]


def check_markers(name: str, template_name: str, source: str, every: int = 1, start: int = 0) -> Iterator[str | None]:
    """One prompt for each special string x role x position; None where its control ids are those of harmless content.

    ``every``: only each such one, from ``start``.
    """
    tokenizer = tokenizer_named(name)
    template = ChatTemplate.from_metadata({"tokenizer.chat_template": source}, tokenizer)
    where = [*POSITIONS, "in reasoning_content"]
    clean: dict[tuple[str, str], list[int] | None] = {}
    cases = itertools.product(tokenizer.special_strings, ROLES, where)
    for marker, role, position in itertools.islice(cases, start, None, every):
        if position == "in reasoning_content":
            first, second, reasoning, plain = "x", "x", f"r {marker} r", ("x", "x", "r")
        else:
            (first, second), reasoning = POSITIONS[position](marker), None
            thinks = position == "in reasoning"
            plain = ("<think>\nr\n</think>\n\na" if thinks else "x", "x", None)
        key = (role, position)
        if key not in clean:
            clean[key] = _ids(template, tokenizer, conversation(role, *plain))
        ids = _ids(template, tokenizer, conversation(role, first, second, reasoning))
        yield None if ids == clean[key] else f"{name}, {template_name}: {marker!r} {position} of {role}: {ids}"


def _ids(template: ChatTemplate, tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int] | None:
    """The control ids of the prompt; None where the template refuses such a conversation."""
    try:
        return control_ids(build_prompt(template, tokenizer, messages).ids, tokenizer)
    except UnsupportedError as error:
        if error.code not in ("template_raised", "template_error"):
            raise
        return None


# --- long runs --------------------------------------------------------------------------------------------------------

UNITS: dict[str, str] = {
    "letters": "abcdefghij",
    "one letter": "a",
    "digits": "7",
    "spaces": " ",
    "newlines": "\n",
    "lines of spaces": " \n",
    "punctuation": "!",
    "brackets": "<",
    "marks": "\u0301",
    "CJK": "中",
    "emoji": "👩\u200d",
    "mixed": "aZ9 \n!é中👩",
    "control": "\x00",
    "a marker": "<|im_end|>",
    "reasoning": "<think>\n",
}
SIZE = 1 << 20  # bytes
RATIO, SLACK = 3.2, 0.05  # linear is 2, quadratic 4; seconds of noise


def run_of(unit: str, size: int) -> str:
    """About ``size`` bytes of it, and a letter: what ends a run is what makes some searches start again."""
    return unit * (size // len(unit.encode())) + "a"


def _decoding(tokenizer: Tokenizer, ids: list[int]) -> Callable[[], object]:
    def work() -> None:
        stream = tokenizer.stream()
        for token in ids:
            stream.feed(token)
        stream.flush()

    return work


def _split(text: str, opened: bool) -> None:
    splitter = ReasoningSplitter(opened)
    for char in text:
        splitter.feed(char)
    splitter.flush()


def _stop(text: str) -> None:
    matcher = StopMatcher(["\n\n\nUser:", "<|im_end|>!", "aaaaaaaaab", "    x"])
    for at in range(0, len(text), 3):
        matcher.feed(text[at : at + 3])
    matcher.flush()


def _prompt(template: ChatTemplate, tokenizer: Tokenizer, text: str) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"<think>{text}</think>{text}"}]
    build_prompt(template, tokenizer, [*messages, {"role": "user", "content": "v"}])


def run_checks(tokenizer: Tokenizer, template: ChatTemplate | None) -> dict[str, Callable[[str], Callable[[], object]]]:
    """What is done with a run: prepared by a text, timed when called."""
    checks: dict[str, Callable[[str], Callable[[], object]]] = {
        "encode": lambda text: lambda: tokenizer.encode(text, parse_special=True),
        "decode": lambda text: _decoding(tokenizer, tokenizer.encode(text)),
    }
    if template is not None:
        checks |= {
            "split": lambda text: lambda: _split(text, False),
            "split, opened": lambda text: lambda: _split(text, True),
            "split, after": lambda text: lambda: _split("<think>r</think>" + text, False),
            "stop": lambda text: lambda: _stop(text),
            "prompt": lambda text: lambda: _prompt(template, tokenizer, text),
        }
    return checks


def seconds_of(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def check_run(prepare: Callable[[str], Callable[[], object]], unit: str, size: int) -> tuple[float, float, bool]:
    """Seconds for half of ``size`` and for all of it, and whether that is linear; measured again where it seems not."""
    works = prepare(run_of(unit, size // 2)), prepare(run_of(unit, size))
    half = whole = float("inf")
    for _ in range(4):
        half, whole = min(half, seconds_of(works[0])), min(whole, seconds_of(works[1]))
        if whole <= RATIO * half + SLACK:
            return half, whole, True
    return half, whole, False


# --- all of it --------------------------------------------------------------------------------------------------------


def all_templates() -> Iterator[str | None]:
    for name, source in TEMPLATES.items():
        problem = check_template(source)
        yield f"template {name!r}: {problem}" if problem else None


def all_markers() -> Iterator[str | None]:
    for name in MARKED:
        for template_name, source in template_sources().items():
            yield from check_markers(name, template_name, source)


def all_runs() -> Iterator[str | None]:
    source = template_sources()["Qwen-Qwen3-0.6B.jinja"]
    for number, name in enumerate((*MARKED, "llama-spm", "deepseek-llm")):
        tokenizer = tokenizer_named(name)
        template = ChatTemplate.from_metadata({"tokenizer.chat_template": source}, tokenizer) if number == 0 else None
        for what, prepare in run_checks(tokenizer, template).items():
            for unit_name, unit in UNITS.items():
                half, whole, linear = check_run(prepare, unit, SIZE)
                found = f"{name}, {what}, {unit_name}: {half:.3f} s for half, {whole:.3f} s for 1 MiB"
                if whole > 2.0:
                    print(found, flush=True)
                yield None if linear else found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"templates": all_templates, "markers": all_markers, "runs": all_runs}
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    failures = 0
    for part in parser.parse_args().parts or parts:
        start, found = time.monotonic(), [0, 0]
        for problem in parts[part]():
            found[0] += 1
            if problem is not None:
                found[1] += 1
                print(problem, flush=True)
        print(f"{part}: {found[0]} checks, {found[1]} failures, {time.monotonic() - start:.0f} s", flush=True)
        failures += found[1]
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
