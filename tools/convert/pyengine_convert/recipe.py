"""Which type each tensor gets: a recipe of :mod:`pyengine.recipe`, and what the user changes about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pyengine import quant
from pyengine.errors import InvalidArgument
from pyengine.recipe import RECIPES, Facts, Recipe, find_recipe, fitting

__all__ = ["QUANTISATION_VERSION", "RECIPES", "Choice", "Facts", "Recipe", "find_recipe", "make_choice"]

QUANTISATION_VERSION = 2  # of the block formats: general.quantization_version


@dataclass(frozen=True)
class Choice:
    """A recipe and what the user changes about it.

    Attributes:
        overrides: (regular expression searched in tensor names, format); the first that matches decides.
        output: format of the matrix that makes the logits; embedding: of ``token_embd.weight``.
        pure: every matrix gets the recipe's main format.
    """

    recipe: Recipe
    overrides: Sequence[tuple[re.Pattern[str], str]] = ()
    output: str | None = None
    embedding: str | None = None
    pure: bool = False

    def of(self, name: str, shape: tuple[int, ...], facts: Facts) -> tuple[str, str]:
        """(format, note) of a tensor; the note says why it is not the usual one, or is empty.

        Norms and biases stay F32.
        """
        if len(shape) < 2:
            return "F32", ""
        wanted, note = self._wanted(name, facts)
        chosen = fitting(wanted, shape[-1])
        if chosen != wanted:
            note = f"rows of {shape[-1]} are no multiple of {256 if chosen != 'F16' else 32}"
        return chosen, note

    def _wanted(self, name: str, facts: Facts) -> tuple[str, str]:
        for pattern, kind in self.overrides:
            if pattern.search(name):
                return kind, "as asked"
        is_head = name == facts.head_name
        if name == "token_embd.weight" and self.embedding is not None:
            return self.embedding, "as asked"
        if is_head and self.output is not None:
            return self.output, "as asked"
        if self.pure:
            return self.recipe.type, ""
        changed = is_head and self.recipe.head != self.recipe.type
        return self.recipe.usual(name, facts), "makes the logits" if changed else ""


def make_choice(
    name: str,
    overrides: Sequence[tuple[str, str]] = (),
    output: str | None = None,
    embedding: str | None = None,
    pure: bool = False,
) -> Choice:
    """A :class:`Choice` of names and patterns as they come from a user. Errors: ``InvalidArgument``."""
    compiled = []
    for pattern, kind in overrides:
        try:
            compiled.append((re.compile(pattern), _format(kind)))
        except re.error as error:
            raise InvalidArgument(f"{pattern!r} is no regular expression: {error}", code="bad_pattern") from None
    return Choice(
        find_recipe(name),
        compiled,
        None if output is None else _format(output),
        None if embedding is None else _format(embedding),
        pure,
    )


def _format(name: str) -> str:
    fmt = quant.FORMATS.get(name.upper())
    if fmt is None or not fmt.can_quantise:
        known = ", ".join(f.name for f in quant.FORMATS.values() if f.can_quantise)
        raise InvalidArgument(f"unknown tensor type {name!r}; known are {known}", code="unknown_type")
    return fmt.name
