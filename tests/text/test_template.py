"""Templates render as the reference implementation does, and hostile ones end in an error after bounded work."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from pyengine.errors import FormatError, UnsupportedError
from pyengine.template import MAX_SOURCE, Template
from tests.support import DATA, HAVE_DATA, needs_data

STEPS, CHARS = 100_000, 4 << 20
CASES = json.loads((DATA / "templates" / "cases.json").read_text(encoding="utf-8")) if HAVE_DATA else []
FILES = sorted(path.name for path in (DATA / "templates").glob("*.jinja")) if HAVE_DATA else []


def render(source: str, **variables: Any) -> str:
    return Template(source).render(variables, steps=STEPS, chars=CHARS)


def source_of(name: str) -> str:
    return (DATA / "templates" / name).read_bytes().decode()


class Reference:
    """Jinja itself, set up as Hugging Face does."""

    def __init__(self) -> None:
        self.environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, jinja2.ext.do]
        )
        self.environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent, default=list
        )
        self.environment.globals["raise_exception"] = self.raise_exception

    def raise_exception(self, message: str) -> None:
        raise jinja2.TemplateError(message)

    def render(self, source: str, **variables: Any) -> str:
        return self.environment.from_string(source).render(**variables)


REFERENCE = Reference()


@needs_data
def test_there_are_cases_and_templates() -> None:
    assert len(CASES) >= 88
    assert len(FILES) >= 7


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['template']}-{case['name']}")
def test_published_templates_render_as_expected(case: dict[str, Any]) -> None:
    assert render(source_of(case["template"]), **case["kwargs"]) == case["expected"]


@pytest.mark.parametrize("name", FILES)
def test_random_conversations_render_as_with_the_reference(name: str) -> None:
    rng = random.Random(name)
    source = source_of(name)
    words = [
        "Hi",
        " spaces ",
        "a\nb",
        "",
        "</think>x",
        "<think>\nr\n</think>\n\nA",
        "<tool_response>",
        "é 👩\u200d👧",
        "{{ 1 }}",
    ]
    for _ in range(40):
        roles = [rng.choice(["user", "assistant", "system", "tool"]) for _ in range(rng.randrange(1, 7))]
        messages = [{"role": role, "content": "".join(rng.choices(words, k=rng.randrange(4)))} for role in roles]
        variables = {
            "messages": messages,
            "add_generation_prompt": rng.random() < 0.5,
            "enable_thinking": rng.random() < 0.5,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "tools": rng.choice(
                [None, [{"type": "function", "function": {"name": "f", "parameters": {"x": [1, None]}}}]]
            ),
        }
        try:
            expected = REFERENCE.render(source, **variables)
        except jinja2.TemplateError:
            with pytest.raises(UnsupportedError):
                render(source, **variables)
        else:
            assert render(source, **variables) == expected


EXPRESSIONS = [
    "1 + 2 * 3 - 4 / 2",
    "7 // 2 ~ 7 % 3 ~ 2 ** 5 ~ -3",
    "1.5 * 2",
    "true ~ false ~ none",
    "'a' 'b'",
    "'ab' * 3",
    "[1, 2] + [3]",
    "(1, 2)",
    "(1,) + (2,)",
    "{'a': 1, 'b': [2, 'c']}",
    "x",
    "missing",
    "missing ~ 'x'",
    "x if x else 'no'",
    "'yes' if missing",
    "x and 'right'",
    "missing or 'right'",
    "not missing",
    "1 < 2 < 3",
    "3 > 2 > 2",
    "1 == 1.0",
    "'a' != 'b'",
    "'b' in 'abc'",
    "2 in [1, 2]",
    "'k' in d",
    "'z' not in d",
    "missing is defined",
    "x is defined",
    "x is string",
    "none is none",
    "d is mapping",
    "[1] is iterable",
    "'s' is iterable",
    "1 is number",
    "true is number",
    "1 is integer",
    "1.0 is float",
    "true is boolean",
    "true is true",
    "0 is false",
    "3 is odd",
    "4 is even",
    "9 is divisibleby 3",
    "'A' is upper",
    "2 is eq 2",
    "2 is ge(1)",
    "2 is in [2]",
    "d.k",
    "d['k']",
    "d.missing",
    "d.get('k')",
    "d.get('q', 'dflt')",
    "d.items() | list",
    "d.keys() | list",
    "d.values() | list",
    "d | items | list",
    "d | dictsort",
    "xs[0]",
    "xs[-1]",
    "xs[9]",
    "xs[1:]",
    "xs[::-1]",
    "'hello'[1:3]",
    "'hello'[0]",
    "' a '.strip() ~ '|'",
    "'a,b'.split(',')",
    "'a b  c'.split()",
    "'aXbX'.split('X', 1)",
    "'a</think>b'.split('</think>')[-1]",
    "'abc'.startswith('ab')",
    "'abc'.startswith(('x', 'a'))",
    "'abc'.endswith('c')",
    "'abc'.upper()",
    "'ab cd'.title()",
    "'abc'.replace('b', 'x')",
    "'-'.join(['a', 'b'])",
    "'abc'.find('c')",
    "'aba'.count('a')",
    "'a\nb'.splitlines()",
    "'x\n'.rstrip('\n') ~ '|'",
    "'prefix-x'.removeprefix('prefix-')",
    "xs | length",
    "'abc' | length",
    "d | length",
    "xs | first",
    "xs | last",
    "[] | first",
    "xs | join(',')",
    "ms | map(attribute='role') | join(',')",
    "ms | map(attribute='nope', default='d') | list",
    "xs | map('string') | list",
    "ms | selectattr('role', 'equalto', 'b') | list",
    "ms | rejectattr('role', 'eq', 'b') | map(attribute='role') | list",
    "xs | select('odd') | list",
    "xs | reject('odd') | list",
    "[0, 1, ''] | select | list",
    "[3, 1, 2] | sort",
    "['b', 'A'] | sort",
    "[3, 1] | sort(reverse=true)",
    "[1, 2, 1] | unique | list",
    "xs | reverse | list",
    "'abc' | reverse",
    "xs | min ~ xs | max",
    "' a ' | trim ~ '|'",
    "'--a' | trim('-')",
    "'abc' | upper",
    "'abc' | capitalize",
    "'aa' | replace('a', 'b')",
    "missing | default('d')",
    "'' | default('d', true)",
    "none | d('x')",
    "'5' | int + 1",
    "'x' | int",
    "'x' | int(7)",
    "'1.5' | float",
    "5 | string ~ 'x'",
    "-3 | abs",
    "2.567 | round(1)",
    "'a\nb' | indent",
    "'a\nb' | indent(2, true)",
    "d | tojson",
    "d | tojson(indent=2)",
    "'<&>é' | tojson",
    "[none, true, 1.5] | tojson",
    "range(3) | list",
    "range(1, 6, 2) | list",
    "dict(a=1)",
    "namespace(a=1).a",
    "xs | list",
    "'ab' | list",
    "[[1, 2], [3]] | map('first') | list",
    "'%s'",
    "ms[0].role ~ ms[1]['role']",
    "xs.index(2)",
    "xs.count(1)",
    "'a' ~ 1 ~ 2.0 ~ none",
    "d == {'k': 'v'}",
    "'a' < 'b'",
]
BODIES = [
    "{% for i in xs %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{% endfor %}",
    "{% for i in xs %}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.depth }}{% endfor %}",
    "{% for i in xs if i > 1 %}{{ i }}{{ loop.length }}{% else %}none{% endfor %}",
    "{% for i in [] %}x{% else %}empty{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }}{% endfor %}",
    "{% for i in xs %}{{ loop.previtem }}<{{ loop.nextitem }},{% endfor %}",
    "{% for i in xs %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in xs %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% set a = 1 %}{% for i in xs %}{% set a = a + i %}{{ a }}{% endfor %}{{ a }}",
    "{% set ns = namespace(a=1) %}{% for i in xs %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
    "{% if missing %}1{% elif xs %}2{% else %}3{% endif %}",
    "{% if true %}{% set q = 5 %}{% endif %}{{ q }}",
    "{% set t %}a{{ x }}b{% endset %}{{ t }}{{ t | length }}",
    "{% set t | upper %}abc{% endset %}{{ t }}",
    "{% filter upper %}abc{{ x }}{% endfilter %}",
    "{% macro m(a, b='B') %}[{{ a }}{{ b }}{{ x }}]{% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(b=3, a=4) }}{{ m() }}",
    "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}inner{% endcall %}",
    "{% macro m() %}<{{ caller('z') }}>{% endmacro %}{% call(v) m() %}in{{ v }}{% endcall %}",
    "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(4) }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% raw %}{{ x }}{% endraw %}{# comment #}",
    "  {%- if true -%}  a  {%- endif -%}  b",
    "{% if true %}\n  line\n    {% endif %}\nend\n",
    "{% for i in xs %}\n  {{ i }}\n{% endfor %}\n",
    "{% do xs %}{{ 'x' }}",
    "{% set outer = 1 %}{% macro m() %}{{ outer }}{% endmacro %}{% for i in xs %}{{ m() }}{% endfor %}",
]
VALUES: dict[str, Any] = {
    "x": "X",
    "xs": [1, 2, 3],
    "d": {"k": "v"},
    "ms": [{"role": "a", "n": 1}, {"role": "b", "n": 2}],
}


@pytest.mark.parametrize("body", [*("{{ " + e + " }}" for e in EXPRESSIONS), *BODIES])
def test_the_language_means_what_jinja_says(body: str) -> None:
    assert render(body, **VALUES) == REFERENCE.render(body, **VALUES)


REFUSED = [
    "{{ missing.attribute }}",
    "{{ missing() }}",
    "{{ 1 + 'a' }}",
    "{{ 'a' + 1 }}",
    "{{ missing + 1 }}",
    "{{ 1 / 0 }}",
    "{{ 1 in 1 }}",
    "{{ 'a' < 1 }}",
    "{{ x | nosuchfilter }}",
    "{{ x is nosuchtest }}",
    "{{ x() }}",
    "{{ xs.append(4) }}",
    "{{ d.update({'a': 1}) }}",
    "{% set d.k = 1 %}",
    "{% for i in 5 %}{% endfor %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ raise_exception('no system role') }}",
    "{{ none | length }}",
    "{{ 1 | tojson | from_json }}",
]


@pytest.mark.parametrize("body", REFUSED)
def test_what_jinja_refuses_is_refused(body: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 - the reference raises whatever Python does
        REFERENCE.render(body, **VALUES)
    with pytest.raises(UnsupportedError, match="chat template, line 1: "):
        render(body, **VALUES)


def test_errors_have_the_line_and_the_message() -> None:
    with pytest.raises(UnsupportedError, match="line 3: the template says: no system role") as raised:
        render("a\n{% if true %}\n{{ raise_exception('no system role') }}{% endif %}")
    assert raised.value.code == "template_raised"
    with pytest.raises(FormatError, match=r"line 2: .*endfor"):
        Template("x\n{% for a in b %}")
    with pytest.raises(UnsupportedError, match=r"line 2: 'y' is undefined, it has no 'z'"):
        render("\n{{ y.z }}")


def test_the_generation_tag_is_transparent() -> None:
    assert render("{% for m in xs %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}", **VALUES) == "123"


def test_the_date_is_known() -> None:
    assert render("{{ strftime_now('%Y') }}").isdigit()


def test_values_of_the_host_are_out_of_reach() -> None:
    for body in (
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ xs | attr('__class__') }}",
        "{{ xs | map(attribute='__class__') | join }}",
        "{{ d.__init__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace().__class__ }}",
        "{{ cycler }}",
        "{{ self }}",
    ):
        assert render(body, **VALUES) == ""
    for body in ("{{ ''.__class__.__mro__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ '%s' | format(1) }}"):
        with pytest.raises(UnsupportedError):
            render(body)
    with pytest.raises(UnsupportedError, match="no plain value"):
        render("{{ x }}", x=object())


def test_rendering_does_not_change_what_it_was_given() -> None:
    class Trap(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            raise AssertionError("a live object reached the template")

    messages = [{"role": "user", "content": ["a"]}]
    assert (
        render("{% set ns = namespace(m=messages) %}{% set ns.m = 1 %}{{ t.k }}", messages=messages, t=Trap(k="v"))
        == "v"
    )
    assert messages == [{"role": "user", "content": ["a"]}]


GROW = "{% set ns = namespace(x=X) %}{% for i in range(99) %}{% set ns.x = Y %}{% endfor %}"
TREES = [
    GROW.replace("X", "[1]").replace("Y", "[ns.x, ns.x]"),
    GROW.replace("X", "[1]").replace("Y", "ns.x + ns.x"),
    GROW.replace("X", "{}").replace("Y", "{'a': ns.x, 'b': ns.x}"),
    GROW.replace("X", "[1]").replace("Y", "ns.x * 99"),
]
HOSTILE = [
    *(
        tree + "{{ ns.x" + use + " }}"
        for tree in TREES
        for use in ("", " | tojson", " == ns.x", " | string", " | length", " | sort")
    ),
    GROW.replace("X", "'aaaa'").replace("Y", "ns.x ~ ns.x") + "{{ ns.x }}",
    GROW.replace("X", "'aaaa'").replace("Y", "ns.x + ns.x"),
    GROW.replace("X", "'aaaa'").replace("Y", "ns.x.replace('a', ns.x)"),
    GROW.replace("X", "'aaaa'").replace("Y", "ns.x.join([ns.x] * 9)"),
    GROW.replace("X", "'aaaa'").replace("Y", "ns.x | list | join(ns.x)"),
    "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 99,
    "{{ 'a' * 1000000000 }}",
    "{{ ([1] * 1000000000) | length }}",
    "{{ range(1000000000) | list }}",
    "{{ range(100000) | list | sort | length }}" * 20,
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 2 ** 62 * 2 ** 62 }}",
    "{{ " + "9" * 20000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{{ " + "not " * 15000 + "1 }}",
    "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "{{ " + "[" * 30000 + "]" * 30000 + " }}",
    "{{ 1" + "+1" * 8000 + " }}",
    "{{ x" + ".a" * 8000 + " }}",
    "{{ 'a'" + "|trim" * 4000 + " }}",
    "{{ 1" + " if 1 else 1" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for a in b %}" * 2000 + "{% endfor %}" * 2000,
    "{{ '" + "\\" * 60000,
    "{%" * 30000,
    "x" * (MAX_SOURCE + 1),
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_ends_in_an_error_within_its_budget(source: str) -> None:
    """Work is bounded by the budget, so what is asserted is that it runs out, not a time; memory is measured."""
    tracemalloc.start()
    try:
        with pytest.raises((UnsupportedError, FormatError)) as caught:
            render(source, messages=[{"role": "user", "content": "Hi"}], x={})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code in ("template_limit", "template_syntax", "template_error")
    assert peak < 96 << 20


@pytest.mark.parametrize("name", FILES)
def test_a_long_conversation_stays_within_the_budget_of_a_chat(name: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>r</think>a"}] * 150
    template = Template(source_of(name))
    text = template.render(
        {"messages": messages, "add_generation_prompt": True}, steps=100 * len(messages), chars=1 << 17
    )
    assert text.count("q") >= 150


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_template_renders_or_gives_an_engine_error(name: str) -> None:
    rng = random.Random(name)
    words = re.findall(r"\{%-?|-?%\}|\{\{-?|-?\}\}|\w+|\s+|.", source_of(name))
    seen = set()
    for _ in range(60):
        damaged = list(words)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice([*rng.choices(words, k=3), "", "1", "none", "()"])
        try:
            render("".join(damaged), messages=[{"role": "user", "content": "Hi"}], bos_token="<s>")
            seen.add("ok")
        except (FormatError, UnsupportedError) as error:
            seen.add(error.code)
    assert {"ok", "template_syntax"} <= seen
