"""Runs Jinja chat templates from untrusted model files.

``jinja2`` parses; this module walks the tree itself and never compiles it to Python. There is no attribute access to
Python objects at all: values are text, numbers, booleans, None, lists and dicts (copied on the way in), and what can be
called is listed here by name. Every node costs a step, every character and element that an operation produces or looks
at is paid for before it is touched, so a hostile template ends in an error after a bounded amount of work and memory.

The semantics are Jinja's with the settings that Hugging Face uses (``trim_blocks``, ``lstrip_blocks``, loop controls,
``{% generation %}``, an immutable sandbox). The file is longer than most because an interpreter is best
read in one place.
"""

from __future__ import annotations

import datetime
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser

from pyengine.errors import FormatError, UnsupportedError

MAX_SOURCE = 64 * 1024  # characters; several times the longest published template
_MAX_TOKENS = 20_000  # of Jinja; published templates have up to some 5,000, and parsing takes about 5 us for each
_MAX_CALLS = 40  # nested macro calls
_MAX_DEPTH = 200  # nested nodes
_MAX_VALUE_DEPTH = 50  # nested lists and dicts
_MAX_RANGE = 100_000
_MAX_INT = 1 << 63
_MAX_MESSAGE = 500  # characters of an error; a template can make names of any length

_Scope = dict[str, Any]


class _Undefined:
    """What a missing name or key evaluates to: prints as nothing, is false and empty, and refuses all else."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Namespace:
    """``namespace(...)``: the one thing a template may assign into."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items = items


class _Loop:
    """The ``loop`` variable. ``items`` is the whole list."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items
        self.index0 = 0

    def get(self, name: str) -> Any:
        at, n = self.index0, len(self.items)
        values: dict[str, Any] = {
            "index0": at,
            "index": at + 1,
            "length": n,
            "revindex": n - at,
            "revindex0": n - at - 1,
        }
        values |= {"first": at == 0, "last": at == n - 1, "depth": 1, "depth0": 0}
        if name == "previtem":
            return self.items[at - 1] if at else _Undefined(name)
        if name == "nextitem":
            return self.items[at + 1] if at + 1 < n else _Undefined(name)
        return values.get(name, _Undefined(name))


class _Stop(Exception):
    """``break`` and ``continue``."""


class _Break(_Stop):
    pass


class _Continue(_Stop):
    pass


class _Failure(Exception):
    """An error in the template; the line is added where it is known."""

    def __init__(self, message: str, code: str = "template_error") -> None:
        super().__init__(message)
        self.code = code
        self.line: int | None = None


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's text for training; for us it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TokenBudget(Extension):
    """Ends the parsing of a source that is nothing but tokens."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for count, token in enumerate(stream):
            if count >= _MAX_TOKENS:
                raise _error(f"it has more than {_MAX_TOKENS} tokens", token.lineno, "template_limit")
            yield token


_EXTENSIONS = ("jinja2.ext.loopcontrols", "jinja2.ext.do", _GenerationTag, _TokenBudget)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as Hugging Face's ``tojson`` writes it: no HTML escapes, non-ASCII kept."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class Template:
    """A parsed template. Immutable; may be rendered by many threads at once.

    Raises:
        FormatError: the source is no valid Jinja; the message has the line.
        UnsupportedError: it is too long or too deeply nested, or includes other templates.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise UnsupportedError(
                f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read", code="template_limit"
            )
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS)
        try:
            self._tree = environment.parse(source)
            _check_nodes(self._tree)
        except jinja2.TemplateSyntaxError as error:
            raise FormatError(
                f"chat template, line {error.lineno}: {error.message}", code="template_syntax", field="chat_template"
            ) from None
        except RecursionError:
            raise _too_deep() from None
        except (ValueError, OverflowError) as error:  # a number that Python refuses to read
            raise FormatError(f"chat template: {error}", code="template_syntax", field="chat_template") from None

    def render(self, variables: Mapping[str, Any], *, steps: int, chars: int) -> str:
        """Runs the template.

        Args:
            variables: plain values (text, numbers, booleans, None, lists, dicts with text keys); copied.
            steps: nodes and elements to evaluate at most; about a microsecond each.
            chars: characters all operations together may produce, which also bounds the output.

        Raises:
            UnsupportedError: the template raised, used something unknown, or went past a limit.
        """
        run = _Run(steps, chars)
        try:
            return run.render(self._tree, {key: _plain(value) for key, value in variables.items()})
        except _Stop:
            raise _error("break or continue outside a loop", None, "template_error") from None
        except _Failure as failure:
            raise _error(str(failure), failure.line, failure.code) from None
        except RecursionError:
            raise _too_deep() from None


def _error(message: str, line: int | None, code: str) -> UnsupportedError:
    where = f", line {line}" if line else ""
    message = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "..."
    return UnsupportedError(f"chat template{where}: {message}", code=code, field="chat_template")


def _too_deep() -> UnsupportedError:
    return _error(f"nested more than {_MAX_DEPTH} levels deep", None, "template_limit")


def _check_nodes(tree: nodes.Node) -> None:
    """How deep they are nested, and that no number is one whose every use is expensive."""
    level: list[nodes.Node] = [tree]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in node.iter_child_nodes()]
        for node in level:
            if isinstance(node, nodes.Const) and isinstance(node.value, int) and abs(node.value) >= _MAX_INT:
                raise _error("numbers too large", node.lineno, "template_limit")
        if not level:
            return
    raise _too_deep()


def _plain(value: Any) -> Any:
    """A fresh copy made of plain values only, so that nothing of the host is reachable."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item) for item in value]
    raise UnsupportedError(
        f"a chat message holds a {type(value).__name__}, which is no plain value", code="bad_message"
    )


class _Run:
    """One rendering: the budget, and one method per kind of node."""

    def __init__(self, steps: int, chars: int) -> None:
        self.steps = steps
        self.chars = chars
        self.calls = 0
        self.globals: _Scope = {}
        self.scopes: list[_Scope] = []
        self.out: list[str] = []

    # --- the budget ---

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise _Failure("it needs too many steps (an endless or hostile loop?)", "template_limit")

    def produce(self, chars: int) -> None:
        """Pays for ``chars`` characters before they are made."""
        self.chars -= chars
        if self.chars < 0:
            raise _Failure("it produces too much text", "template_limit")

    def text(self, value: str) -> str:
        self.produce(len(value))
        return value

    def search(self, text: str, wanted: str, *, from_left: bool = True) -> None:
        """Pays for looking for ``wanted`` (a text, or a set of characters) all over ``text``.

        At worst every character is compared with all of ``wanted``; from the left Python does better where both are
        long: it then searches in linear time. Sixteen comparisons count as a character that is made.
        """
        compared = min(len(wanted), 100) if from_left and len(text) >= 2500 else len(wanted)
        self.produce(len(text) * (compared + 1) // 16)

    def weigh(self, value: Any, *, written: bool = False, depth: int = 0) -> None:
        """Pays for looking at everything inside ``value``, or for writing it out.

        Nested lists may share parts, so what counts is the size they have when written out.
        """
        self.spend(1)
        if isinstance(value, str):
            self.produce(len(value) if written else len(value) // 8)
        elif isinstance(value, (list, tuple, dict)):
            if depth > _MAX_VALUE_DEPTH:
                raise _Failure("values are nested too deeply", "template_limit")
            for item in value.values() if isinstance(value, dict) else value:
                self.weigh(item, written=written, depth=depth + 1)
            if written and isinstance(value, dict):
                self.produce(sum(len(key) for key in value if isinstance(key, str)))
        elif written and not isinstance(value, (int, float, type(None))):
            raise _Failure(f"{self.describe(value)} cannot be printed")

    def new(self, value: Any) -> Any:
        """A container that an operation made."""
        self.weigh(value)
        return value

    # --- statements ---

    def render(self, tree: nodes.Template, variables: _Scope) -> str:
        self.globals = {**_GLOBALS, **variables}
        self.scopes = [{}]
        self.body(tree.body)
        return "".join(self.out)

    def body(self, statements: Iterable[nodes.Node]) -> None:
        for node in statements:
            self.spend(1)
            handler = _STATEMENTS.get(type(node).__name__)
            if handler is None:
                raise self.at(node, f"{type(node).__name__.lower()} is not supported in chat templates")
            try:
                handler(self, node)
            except _Failure as failure:
                raise self.at(node, failure) from None

    def at(self, node: nodes.Node, failure: _Failure | str) -> _Failure:
        result = failure if isinstance(failure, _Failure) else _Failure(failure)
        if result.line is None:
            result.line = node.lineno
        return result

    def output(self, node: nodes.Output) -> None:
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                self.spend(1)
                self.out.append(self.text(part.data))
            else:
                self.out.append(self.to_text(self.eval(part)))

    def captured(self, statements: Iterable[nodes.Node]) -> str:
        outer, self.out = self.out, []
        try:
            self.body(statements)
            return self.text("".join(self.out))
        finally:
            self.out = outer

    def if_(self, node: nodes.If) -> None:
        if self.truth(self.eval(node.test)):
            self.body(node.body)
            return
        for branch in node.elif_:
            if self.truth(self.eval(branch.test)):
                self.body(branch.body)
                return
        self.body(node.else_)

    def for_(self, node: nodes.For) -> None:
        if node.recursive:
            raise _Failure("recursive loops are not supported")
        items = self.items(self.eval(node.iter))
        self.scopes.append({})
        try:
            if node.test is not None:
                kept = []
                for item in items:
                    self.assign(node.target, item)
                    if self.truth(self.eval(node.test)):
                        kept.append(item)
                items = kept
            loop = _Loop(items)
            for index, item in enumerate(items):
                self.spend(1)
                loop.index0 = index
                self.scopes[-1] = {"loop": loop}  # what an iteration sets does not survive it
                self.assign(node.target, item)
                try:
                    self.body(node.body)
                except _Continue:
                    continue
                except _Break:
                    break
        finally:
            self.scopes.pop()
        if not items:
            self.body(node.else_)

    def assign(self, target: nodes.Node, value: Any) -> None:
        if isinstance(target, nodes.Name):
            self.scopes[-1][target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = self.lookup(target.name)
            if not isinstance(space, _Namespace):
                raise _Failure(f"{target.name!r} is no namespace, it cannot be assigned into")
            space.items[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            items = self.items(value)
            if len(items) != len(target.items):
                raise _Failure(f"cannot unpack {len(items)} values into {len(target.items)} names")
            for part, item in zip(target.items, items, strict=True):
                self.assign(part, item)
        else:
            raise _Failure("this cannot be assigned to")

    def set_(self, node: nodes.Assign) -> None:
        self.assign(node.target, self.eval(node.node))

    def set_block(self, node: nodes.AssignBlock) -> None:
        text = self.scoped(node.body)
        self.assign(node.target, text if node.filter is None else self.filter(node.filter, text))

    def scoped(self, statements: Iterable[nodes.Node], scope: _Scope | None = None) -> str:
        self.scopes.append(scope or {})
        try:
            return self.captured(statements)
        finally:
            self.scopes.pop()

    def filter_block(self, node: nodes.FilterBlock) -> None:
        self.out.append(self.to_text(self.filter(node.filter, self.scoped(node.body))))

    def with_(self, node: nodes.With) -> None:
        values = [self.eval(value) for value in node.values]
        self.scopes.append({})
        try:
            for target, value in zip(node.targets, values, strict=True):
                self.assign(target, value)
            self.body(node.body)
        finally:
            self.scopes.pop()

    def macro(self, node: nodes.Macro) -> None:
        self.scopes[-1][node.name] = self.make_macro(node, node.name)

    def call_block(self, node: nodes.CallBlock) -> None:
        caller = self.make_macro(node, "caller")
        self.out.append(self.to_text(self.call(node.call, {"caller": caller})))

    def make_macro(self, node: nodes.Macro | nodes.CallBlock, name: str) -> Callable[..., Any]:
        names = [argument.name for argument in node.args]
        defaults = dict(zip(names[len(names) - len(node.defaults) :], node.defaults, strict=True))
        seen = self.scopes[: 1 if isinstance(node, nodes.Macro) else None]  # a macro sees the template's names

        def run(_: _Run, *args: Any, **kwargs: Any) -> str:
            caller = {"caller": kwargs.pop("caller")} if "caller" in kwargs else {}
            unknown = sorted(set(kwargs) - set(names))
            if len(args) > len(names) or unknown:
                raise _Failure(f"{name}() takes {', '.join(names) or 'no arguments'}")
            if self.calls >= _MAX_CALLS:
                raise _Failure("macros call each other too deeply", "template_limit")
            self.calls += 1
            outer, self.scopes = self.scopes, [*seen, {}]
            try:
                scope = self.scopes[-1]
                scope.update(caller)
                scope.update(zip(names, args, strict=False))
                scope.update(kwargs)
                for missing in names:
                    if missing not in scope:
                        scope[missing] = self.eval(defaults[missing]) if missing in defaults else _Undefined(missing)
                return self.captured(node.body)
            finally:
                self.scopes = outer
                self.calls -= 1

        return run

    def do(self, node: nodes.ExprStmt) -> None:
        self.eval(node.node)

    def block(self, node: nodes.Block) -> None:
        self.body(node.body)

    def break_(self, node: nodes.Break) -> NoReturn:
        raise _Break

    def continue_(self, node: nodes.Continue) -> NoReturn:
        raise _Continue

    # --- expressions ---

    def eval(self, node: nodes.Node) -> Any:
        self.spend(1)
        handler = _EXPRESSIONS.get(type(node).__name__)
        if handler is None:
            raise self.at(node, f"{type(node).__name__} is not supported in chat templates")
        try:
            return handler(self, node)
        except _Failure as failure:
            raise self.at(node, failure) from None

    def name(self, node: nodes.Name) -> Any:
        return self.lookup(node.name)

    def lookup(self, name: str) -> Any:
        self.spend(len(self.scopes) // 16)
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return self.globals[name] if name in self.globals else _Undefined(name)

    def const(self, node: nodes.Const) -> Any:
        return node.value

    def template_data(self, node: nodes.TemplateData) -> Any:
        return node.data

    def list_(self, node: nodes.List) -> Any:
        return self.new([self.eval(item) for item in node.items])

    def tuple_(self, node: nodes.Tuple) -> Any:
        return self.new(tuple(self.eval(item) for item in node.items))

    def dict_(self, node: nodes.Dict) -> Any:
        return self.new({self.key(self.eval(pair.key)): self.eval(pair.value) for pair in node.items})

    def key(self, value: Any) -> Any:
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise _Failure("a dict key must be text or a number")
        return value

    def cond(self, node: nodes.CondExpr) -> Any:
        if self.truth(self.eval(node.test)):
            return self.eval(node.expr1)
        return self.eval(node.expr2) if node.expr2 is not None else _Undefined("the else of an inline if")

    def and_(self, node: nodes.And) -> Any:
        left = self.eval(node.left)
        return self.eval(node.right) if self.truth(left) else left

    def or_(self, node: nodes.Or) -> Any:
        left = self.eval(node.left)
        return left if self.truth(left) else self.eval(node.right)

    def not_(self, node: nodes.Not) -> Any:
        return not self.truth(self.eval(node.node))

    def neg(self, node: nodes.Neg) -> Any:
        return -self.number(self.eval(node.node))

    def pos(self, node: nodes.Pos) -> Any:
        return self.number(self.eval(node.node))

    def add(self, node: nodes.Add) -> Any:
        left, right = self.eval(node.left), self.eval(node.right)
        if isinstance(left, str) and isinstance(right, str):
            self.produce(len(left) + len(right))
            return left + right
        for kind in (list, tuple):
            if isinstance(left, kind) and isinstance(right, kind):
                self.spend(len(left) + len(right))
                return self.new(kind([*left, *right]))
        return self.arithmetic(operator.add, left, right)

    def mul(self, node: nodes.Mul) -> Any:
        left, right = self.eval(node.left), self.eval(node.right)
        if isinstance(right, (str, list)):
            left, right = right, left
        if isinstance(left, (str, list)) and isinstance(right, int):
            size = len(left) * max(int(right), 0)
            self.produce(size)
            if isinstance(left, list):
                self.spend(size)
            return self.new(left * right)
        return self.arithmetic(operator.mul, left, right)

    def binary(self, node: nodes.BinExpr) -> Any:
        return self.arithmetic(_ARITHMETIC[node.operator], self.eval(node.left), self.eval(node.right))

    def arithmetic(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        left, right = self.number(left), self.number(right)
        if function is operator.pow and (abs(right) > 63 or abs(left) > 1 << 32):
            raise _Failure("numbers too large", "template_limit")
        try:
            result = function(left, right)
        except (ArithmeticError, ValueError) as error:
            raise _Failure(str(error)) from None
        if isinstance(result, complex) or abs(result) >= _MAX_INT:
            raise _Failure("numbers too large", "template_limit")
        return result

    def number(self, value: Any) -> Any:
        if isinstance(value, (int, float)):
            return value
        raise _Failure(f"{self.describe(value)} is no number")

    def concat(self, node: nodes.Concat) -> Any:
        return self.text("".join([self.to_text(self.eval(part)) for part in node.nodes]))

    def compare(self, node: nodes.Compare) -> Any:
        left = self.eval(node.expr)
        for operand in node.ops:
            right = self.eval(operand.expr)
            if not self.compare_one(operand.op, left, right):
                return False
            left = right
        return True

    def compare_one(self, op: str, left: Any, right: Any) -> bool:
        self.weigh(left)
        self.weigh(right)
        if op in ("eq", "ne"):
            both = isinstance(left, _Undefined) and isinstance(right, _Undefined)
            return (both or left == right) is (op == "eq")
        if op in ("in", "notin"):
            if isinstance(right, _Undefined):
                return op == "notin"
            searchable = isinstance(right, (list, tuple, dict)) or (isinstance(right, str) and isinstance(left, str))
            if not searchable:
                raise _Failure(f"cannot look for {self.describe(left)} in {self.describe(right)}")
            if isinstance(right, dict):
                left = self.key(left)
            elif isinstance(right, str):
                self.search(right, left)
            return (left in right) is (op == "in")
        try:
            return bool(_ORDER[op](left, right))
        except TypeError:
            raise _Failure(f"cannot compare {self.describe(left)} with {self.describe(right)}") from None

    def getattr(self, node: nodes.Getattr) -> Any:
        return self.attribute(self.eval(node.node), node.attr)

    def attribute(self, value: Any, name: str) -> Any:
        if isinstance(value, _Undefined):
            raise _Failure(f"{value.name!r} is undefined, it has no {name!r}")
        if isinstance(value, _Namespace):
            return value.items.get(name, _Undefined(name))
        if isinstance(value, _Loop):
            return value.get(name)
        method = _METHODS.get(type(value), {}).get(name)
        if method is not None:
            return _Bound(method, value)
        return value.get(name, _Undefined(name)) if isinstance(value, dict) else _Undefined(name)

    def getitem(self, node: nodes.Getitem) -> Any:
        value = self.eval(node.node)
        if isinstance(node.arg, nodes.Slice):
            parts = (node.arg.start, node.arg.stop, node.arg.step)
            return self.slice(value, [None if part is None else self.eval(part) for part in parts])
        return self.item(value, self.eval(node.arg))

    def slice(self, value: Any, parts: list[Any]) -> Any:
        if not isinstance(value, (str, list, tuple)) or not all(p is None or isinstance(p, int) for p in parts):
            raise _Failure(f"cannot slice {self.describe(value)}")
        if parts[2] == 0:
            raise _Failure("the step of a slice is zero")
        result = value[slice(*parts)]
        if isinstance(result, str):
            return self.text(result)
        self.spend(len(result))
        return result

    def item(self, value: Any, key: Any) -> Any:
        if isinstance(value, dict) and isinstance(key, (str, int, float, type(None))) and key in value:
            return value[key]
        if isinstance(value, (str, list, tuple)) and isinstance(key, int):
            return value[key] if -len(value) <= key < len(value) else _Undefined(str(key))
        if isinstance(key, str) or isinstance(value, _Undefined):
            return self.attribute(value, key if isinstance(key, str) else str(key)[:20])
        return _Undefined("an item")

    def call(self, node: nodes.Node, extra: _Scope | None = None) -> Any:
        if not isinstance(node, nodes.Call):
            raise _Failure("this cannot be called")
        function = self.eval(node.node)
        args, kwargs = self.arguments(node)
        kwargs |= extra or {}
        if isinstance(function, _Undefined):
            raise _Failure(f"{function.name!r} is undefined, it cannot be called")
        if not callable(function):
            raise _Failure(f"{self.describe(function)} cannot be called")
        return self.invoke(function, args, kwargs)

    def arguments(self, node: nodes.Call | nodes.Filter | nodes.Test) -> tuple[list[Any], dict[str, Any]]:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _Failure("* and ** arguments are not supported")
        return [self.eval(a) for a in node.args], {str(k.key): self.eval(k.value) for k in node.kwargs}

    def invoke(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return function(self, *args, **kwargs)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
            reason = re.sub(r"^\S*\(\) ", "", str(error))  # without the name of the Python function
            raise _Failure(f"wrong arguments: {reason}") from None

    def filter(self, node: nodes.Filter, value: Any = None) -> Any:
        if node.node is not None:
            value = self.eval(node.node)
        args, kwargs = self.arguments(node)
        return self.apply_filter(node.name, value, args, kwargs)

    def apply_filter(self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        function = _FILTERS.get(name)
        if function is None:
            raise _Failure(f"there is no filter {name!r}")
        return self.invoke(function, [value, *args], kwargs)

    def test(self, node: nodes.Test) -> Any:
        args, kwargs = self.arguments(node)
        return self.apply_test(node.name, self.eval(node.node), args, kwargs)

    def apply_test(self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        function = _TESTS.get(name)
        if function is None:
            raise _Failure(f"there is no test {name!r}")
        return bool(self.invoke(function, [value, *args], kwargs))

    # --- conversions ---

    def truth(self, value: Any) -> bool:
        return False if isinstance(value, _Undefined) else bool(value)

    def items(self, value: Any) -> list[Any]:
        """What iterating gives, as a list that has been paid for (not for what its elements hold)."""
        if isinstance(value, _Undefined):
            return []
        if not isinstance(value, (str, list, tuple, dict)):
            raise _Failure(f"{self.describe(value)} cannot be iterated over")
        self.spend(len(value))
        return list(value)

    def to_text(self, value: Any) -> str:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, _Undefined):
            return ""
        self.weigh(value, written=True)
        return self.text(str(value))

    def describe(self, value: Any) -> str:
        if isinstance(value, _Undefined):
            return f"{value.name!r} (undefined)"
        names = {str: "text", dict: "a dict", list: "a list", type(None): "none", _Namespace: "a namespace"}
        return names.get(type(value), "a function" if callable(value) else type(value).__name__)


class _Bound:
    """A method together with its value; callable by templates, not printable."""

    def __init__(self, method: Callable[..., Any], value: Any) -> None:
        self.method = method
        self.value = value

    def __call__(self, run: _Run, *args: Any, **kwargs: Any) -> Any:
        return self.method(run, self.value, *args, **kwargs)


# --- what templates may call ------------------------------------------------------------------------------------------


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text expected")
    return value


def _text_method(name: str) -> Callable[..., Any]:
    """A method of str whose result is no longer than a few times its input."""
    method = getattr(str, name)

    def call(run: _Run, value: Any, *args: Any) -> Any:
        run.produce(len(_string(value)))
        for arg in args:
            run.weigh(arg)
            if name in _SEARCHES and isinstance(arg, str):
                run.search(value, arg, from_left=_SEARCHES[name])
        return run.new(method(value, *args))

    return call


def _replace(run: _Run, value: Any, old: Any, new: Any, count: int = -1) -> str:
    value, old, new = run.to_text(value), run.to_text(old), run.to_text(new)
    run.search(value, old)
    run.produce(value.count(old) * len(new) + len(value))
    return str(value.replace(old, new, -1 if count is None else count))


def _join(run: _Run, separator: str, items: Any) -> str:
    parts = [run.to_text(item) for item in run.items(items)]
    run.produce(len(separator) * len(parts))
    return run.text(separator.join(parts))


def _join_filter(run: _Run, value: Any, d: str = "", attribute: Any = None) -> str:
    items = run.items(value)
    return _join(run, _string(d), items if attribute is None else [_path(run, item, attribute) for item in items])


def _path(run: _Run, value: Any, attribute: Any) -> Any:
    """``attribute`` may be dotted, or an index."""
    run.weigh(attribute)
    parts = attribute.split(".") if isinstance(attribute, str) else [attribute]
    run.spend(len(parts))
    for part in parts:
        value = run.item(value, int(part) if isinstance(part, str) and part.isdigit() else part)
    return value


def _map(run: _Run, value: Any, name: Any = None, *args: Any, **kwargs: Any) -> list[Any]:
    if "attribute" in kwargs:
        default = kwargs.get("default")
        found = [_path(run, item, kwargs["attribute"]) for item in run.items(value)]
        return [default if isinstance(item, _Undefined) and "default" in kwargs else item for item in found]
    return [run.apply_filter(_string(name), item, args, kwargs) for item in run.items(value)]


def _select(keep: bool, by_attribute: bool) -> Callable[..., list[Any]]:
    def call(run: _Run, value: Any, *args: Any) -> list[Any]:
        attribute, rest = (args[0], args[1:]) if by_attribute else (None, args)
        kept = []
        for item in run.items(value):
            seen = _path(run, item, attribute) if by_attribute else item
            good = run.apply_test(_string(rest[0]), seen, rest[1:], {}) if rest else run.truth(seen)
            if good is keep:
                kept.append(item)
        return kept

    return call


def _default(run: _Run, value: Any, default: Any = "", boolean: bool = False) -> Any:
    missing = isinstance(value, _Undefined) or (boolean and not run.truth(value))
    return default if missing else value


def _to_json_filter(run: _Run, value: Any, indent: int | None = None, **options: Any) -> str:
    run.weigh(value, written=True)
    if indent is not None and not 0 <= int(indent) <= 16:
        raise ValueError("indent must be 0 to 16")
    sort, ascii_only = bool(options.pop("sort_keys", False)), bool(options.pop("ensure_ascii", False))
    separators = options.pop("separators", None)
    if options:
        raise TypeError(f"tojson has no {', '.join(options)}")
    encoder = json.JSONEncoder(ensure_ascii=ascii_only, indent=indent, sort_keys=sort, separators=separators)
    return "".join(map(run.text, encoder.iterencode(value)))  # piece by piece: separators may have any length


def _indent(run: _Run, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * min(int(width), 64)
    lines = run.to_text(value).split("\n")
    run.produce(len(lines) * len(margin))
    kept = [
        line if (i == 0 and not first) or (not line and not blank) else margin + line for i, line in enumerate(lines)
    ]
    return run.text("\n".join(kept))


def _sort(
    run: _Run, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
) -> list[Any]:
    items = run.items(value)
    keys = [item if attribute is None else _path(run, item, attribute) for item in items]
    run.new(keys)
    run.spend(len(keys) * 20)  # comparisons: n log n
    keys = [k.lower() if isinstance(k, str) and not case_sensitive else k for k in keys]
    order = sorted(range(len(items)), key=keys.__getitem__, reverse=bool(reverse))
    return [items[i] for i in order]


def _unique(run: _Run, value: Any) -> list[Any]:
    seen: dict[Any, Any] = {}
    for item in run.items(value):
        seen.setdefault(item.lower() if isinstance(item, str) else run.key(item), item)
    return list(seen.values())


def _number_filter(kind: type[int] | type[float]) -> Callable[..., Any]:
    def call(run: _Run, value: Any, default: Any = 0) -> Any:
        if (isinstance(value, str) and len(value) > 40) or not isinstance(value, (str, int, float)):
            return default
        try:
            return kind(value)
        except (ValueError, OverflowError):
            return default

    return call


def _length(run: _Run, value: Any) -> int:
    return 0 if isinstance(value, _Undefined) else len(value)


def _first(run: _Run, value: Any) -> Any:
    items = run.items(value)
    return items[0] if items else _Undefined("first")


def _last(run: _Run, value: Any) -> Any:
    items = run.items(value)
    return items[-1] if items else _Undefined("last")


def _extreme(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(run: _Run, value: Any) -> Any:
        items = run.items(value)
        run.new(items)
        return function(items) if items else _Undefined("item of an empty list")

    return call


def _items_filter(run: _Run, value: Any) -> list[Any]:
    return [] if isinstance(value, _Undefined) else _dict_items(run, value)


def _dict_items(run: _Run, value: Any) -> list[Any]:
    if not isinstance(value, dict):
        raise TypeError("a dict expected")
    run.spend(2 * len(value))
    return [(key, item) for key, item in value.items()]


def _dict_get(run: _Run, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    return value.get(run.key(key), default)


def _split_method(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(run: _Run, value: str, sep: Any = None, maxsplit: int = -1) -> list[str]:
        run.produce(len(value))
        run.search(value, sep or "", from_left=_SEARCHES[name])
        run.spend(value.count(sep) if sep else len(value) // 2)
        return list(run.new(method(value, sep, maxsplit)))

    return call


def _splitlines(run: _Run, value: str, keepends: bool = False) -> list[str]:
    run.spend(len(value) // 8)
    return list(run.new(value.splitlines(bool(keepends))))


def _raise_exception(run: _Run, message: Any = "") -> NoReturn:
    raise _Failure(f"the template says: {run.to_text(message)[:500]}", "template_raised")


def _strftime_now(run: _Run, format: str) -> str:
    if len(_string(format)) > 100:
        raise ValueError("the format is too long")
    return run.text(datetime.datetime.now().strftime(format))


def _range(run: _Run, *args: int) -> list[int]:
    numbers = range(*args)
    if len(numbers) > _MAX_RANGE:
        raise _Failure(f"range has more than {_MAX_RANGE} elements", "template_limit")
    run.spend(len(numbers))
    return list(numbers)


def _namespace(run: _Run, *args: Any, **kwargs: Any) -> _Namespace:
    return _Namespace(_dict(run, *args, **kwargs))


def _dict(run: _Run, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    given = args[0] if args else {}
    run.spend(len(given))
    return {**dict(given), **kwargs}


def _reverse(run: _Run, value: Any) -> Any:
    return run.text(value[::-1]) if isinstance(value, str) else run.items(value)[::-1]


def _trim(run: _Run, value: Any, chars: Any = None) -> str:
    value = run.to_text(value)
    run.search(value, chars or "", from_left=False)
    return str(value.strip(chars))


def _on_text(name: str) -> Callable[..., Any]:
    method = getattr(str, name)
    return lambda run, value: run.text(method(run.to_text(value)))


def _is_kind(*kinds: type) -> Callable[..., bool]:
    return lambda run, value: isinstance(value, kinds)


def _compare_test(op: str) -> Callable[..., bool]:
    return lambda run, value, other: run.compare_one(op, value, other)


def _simple(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda run, *args: function(*args)


_GLOBALS: Mapping[str, Callable[..., Any]] = {
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
    "range": _range,
    "namespace": _namespace,
    "dict": _dict,
}

# Methods that look for their argument (or each character of it) everywhere, and whether from the left.
_SEARCHES: Mapping[str, bool] = {
    **dict.fromkeys(("find", "index", "count", "partition", "split"), True),
    **dict.fromkeys(("rfind", "rpartition", "rsplit", "strip", "lstrip", "rstrip"), False),
}
_TEXT_METHODS = (
    *("strip", "lstrip", "rstrip", "startswith", "endswith", "upper", "lower", "title", "capitalize", "swapcase"),
    *("find", "rfind", "index", "count", "isdigit", "isalpha", "isalnum", "isspace", "isupper", "islower"),
    *("isnumeric", "isdecimal", "removeprefix", "removesuffix", "partition", "rpartition"),
)
_METHODS: Mapping[type, Mapping[str, Callable[..., Any]]] = {
    str: {
        **{name: _text_method(name) for name in _TEXT_METHODS},
        **{name: _split_method(name) for name in ("split", "rsplit")},
        "splitlines": _splitlines,
        "replace": _replace,
        "join": _join,
    },
    dict: {
        "items": _dict_items,
        "keys": lambda run, value: run.items(value),
        "values": lambda run, value: [item for _, item in _dict_items(run, value)],
        "get": _dict_get,
    },
    list: {
        "index": lambda run, value, item: run.new(value).index(item),
        "count": lambda run, value, item: run.new(value).count(item),
    },
}
_FILTERS: Mapping[str, Callable[..., Any]] = {
    "trim": _trim,
    "length": _length,
    "count": _length,
    "tojson": _to_json_filter,
    "string": lambda run, value: run.to_text(value),
    "safe": lambda run, value: value,
    "int": _number_filter(int),
    "float": _number_filter(float),
    "abs": lambda run, value: abs(run.number(value)),
    "round": lambda run, value, precision=0: float(round(run.number(value), min(max(precision, 0), 20))),
    "list": lambda run, value: run.items(value),
    "first": _first,
    "last": _last,
    "min": _extreme(min),
    "max": _extreme(max),
    "join": _join_filter,
    **{name: _on_text(name) for name in ("upper", "lower", "capitalize", "title")},
    "replace": _replace,
    "default": _default,
    "d": _default,
    "map": _map,
    "select": _select(True, False),
    "reject": _select(False, False),
    "selectattr": _select(True, True),
    "rejectattr": _select(False, True),
    "items": _items_filter,
    "dictsort": lambda run, value: _sort(run, _dict_items(run, value), attribute=0),
    "sort": _sort,
    "unique": _unique,
    "reverse": _reverse,
    "indent": _indent,
    "attr": lambda run, value, name: run.attribute(value, _string(name)),
}
_COMPARISONS = {
    "eq": ("eq", "==", "equalto"),
    "ne": ("ne", "!="),
    "lt": ("lt", "<", "lessthan"),
    "lteq": ("le", "<="),
    "gt": ("gt", ">", "greaterthan"),
    "gteq": ("ge", ">="),
    "in": ("in",),
}
_TESTS: Mapping[str, Callable[..., Any]] = {
    "defined": _simple(lambda value: not isinstance(value, _Undefined)),
    "undefined": _is_kind(_Undefined),
    "none": _is_kind(type(None)),
    "string": _is_kind(str),
    "number": _is_kind(int, float),
    "integer": _simple(lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": _is_kind(float),
    "boolean": _is_kind(bool),
    "true": _simple(lambda value: value is True),
    "false": _simple(lambda value: value is False),
    "mapping": _is_kind(dict),
    "iterable": _is_kind(str, list, tuple, dict, _Undefined),
    "sequence": _is_kind(str, list, tuple, dict, _Undefined),
    "callable": _simple(callable),
    "odd": lambda run, value: run.number(value) % 2 == 1,
    "even": lambda run, value: run.number(value) % 2 == 0,
    "divisibleby": lambda run, value, other: run.number(value) % run.number(other) == 0,
    "sameas": _simple(operator.is_),
    "lower": _text_method("islower"),
    "upper": _text_method("isupper"),
    **{name: _compare_test(op) for op, names in _COMPARISONS.items() for name in names},
}
_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "-": operator.sub,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
_ORDER: Mapping[str, Callable[[Any, Any], Any]] = {
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}
_STATEMENTS: Mapping[str, Callable[[_Run, Any], None]] = {
    "Output": _Run.output,
    "If": _Run.if_,
    "For": _Run.for_,
    "Assign": _Run.set_,
    "AssignBlock": _Run.set_block,
    "FilterBlock": _Run.filter_block,
    "With": _Run.with_,
    "Macro": _Run.macro,
    "CallBlock": _Run.call_block,
    "ExprStmt": _Run.do,
    "Block": _Run.block,
    "Break": _Run.break_,
    "Continue": _Run.continue_,
}
_EXPRESSIONS: Mapping[str, Callable[[_Run, Any], Any]] = {
    "Name": _Run.name,
    "Const": _Run.const,
    "TemplateData": _Run.template_data,
    "List": _Run.list_,
    "Tuple": _Run.tuple_,
    "Dict": _Run.dict_,
    "CondExpr": _Run.cond,
    "And": _Run.and_,
    "Or": _Run.or_,
    "Not": _Run.not_,
    "Neg": _Run.neg,
    "Pos": _Run.pos,
    "Add": _Run.add,
    "Mul": _Run.mul,
    **dict.fromkeys(("Sub", "Div", "FloorDiv", "Mod", "Pow"), _Run.binary),
    "Concat": _Run.concat,
    "Compare": _Run.compare,
    "Getattr": _Run.getattr,
    "Getitem": _Run.getitem,
    "Call": _Run.call,
    "Filter": _Run.filter,
    "Test": _Run.test,
}
