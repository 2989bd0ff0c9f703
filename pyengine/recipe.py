"""Which format each tensor of a file gets under the names users know (``Q4_K_M``).

Facts about files: `tests/convert/test_recipes.py` holds them as llama.cpp's tool writes them. The converter follows
them, the planner counts with them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyengine import quant
from pyengine.errors import InvalidArgument


@dataclass(frozen=True)
class Facts:
    """What a recipe looks at beside the tensor: layers, query heads for each KV head, tied head, importance given."""

    arch: str
    layers: int
    group: int
    tied: bool
    importance: bool = False

    @property
    def head_name(self) -> str:
        """The matrix that makes the logits."""
        return "token_embd.weight" if self.tied else "output.weight"


@dataclass(frozen=True)
class Recipe:
    """What ``--type`` stands for.

    Attributes:
        name: as on the command line, in capitals.
        file_type: ``general.file_type``.
        type: format of matrices.
        head: format of the matrix that makes the logits: ``output.weight``, or the embedding where it is tied.
    """

    name: str
    file_type: int
    type: str
    head: str = "Q6_K"

    def usual(self, name: str, facts: Facts) -> str:
        """The format of a matrix by its name."""
        if name == facts.head_name:
            return self.head
        layer = _LAYER.fullmatch(name)
        return self._of_layer(layer[2], int(layer[1]), facts) if layer else self.type

    def format_of(self, name: str, shape: tuple[int, ...], facts: Facts) -> str:
        """The format of a tensor, shape with rows first. Norms and biases stay F32."""
        return fitting(self.usual(name, facts), shape[-1]) if len(shape) > 1 else "F32"

    def _of_layer(self, part: str, layer: int, facts: Facts) -> str:
        if part == "attn_v":
            return self._attn_v(layer, facts)
        if part == "ffn_down":
            return self._ffn_down(layer, facts)
        if part == "attn_output":
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.name, self.type)
        return self.type

    def _attn_v(self, layer: int, facts: Facts) -> str:
        kind = self.type
        if self.name == "Q2_K":
            kind = "Q4_K" if facts.group >= 4 else "Q3_K"
        elif self.name == "Q3_K_M":
            kind = "Q5_K" if layer < 2 else "Q4_K"
        elif (
            self.name == "Q3_K_L"
            or (self.name.startswith("IQ4") and facts.group >= 4)
            or (self.name == "Q4_K_S" and layer < 4)
        ):
            kind = "Q5_K"
        elif self.name in {"Q4_K_M", "Q5_K_M"} and _counts_more(layer, facts.layers):
            kind = "Q6_K"
        if facts.arch == "llama" and facts.layers == 80 and kind in {"Q3_K", "Q4_K"}:
            return "Q5_K"  # the 70B models: eight heads share a value matrix, which is small
        return kind

    def _ffn_down(self, layer: int, facts: Facts) -> str:
        early = layer < facts.layers // 8
        if self.name == "Q2_K":
            return "Q3_K"
        if self.name == "Q3_K_M":
            return "Q5_K" if layer < facts.layers // 16 else "Q4_K"
        if self.name == "Q3_K_L" or (self.name == "Q4_K_S" and early):
            return "Q5_K"
        if self.name in {"Q4_K_M", "Q5_K_M"} and _counts_more(layer, facts.layers):
            return "Q6_K"
        if self.name.startswith("IQ4") and early and not facts.importance:
            return "Q5_K"
        if self.name in {"Q4_0", "Q5_0"} and early and facts.importance:
            return self.name[:-1] + "1"
        return self.type


def _counts_more(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("F32", 0, "F32", "F32"),
        Recipe("F16", 1, "F16", "F16"),
        Recipe("BF16", 32, "BF16", "BF16"),
        Recipe("Q8_0", 7, "Q8_0", "Q8_0"),
        Recipe("Q6_K", 18, "Q6_K"),
        Recipe("Q5_K_M", 17, "Q5_K"),
        Recipe("Q5_K_S", 16, "Q5_K"),
        Recipe("Q5_1", 9, "Q5_1"),
        Recipe("Q5_0", 8, "Q5_0"),
        Recipe("Q4_K_M", 15, "Q4_K"),
        Recipe("Q4_K_S", 14, "Q4_K"),
        Recipe("Q4_1", 3, "Q4_1"),
        Recipe("Q4_0", 2, "Q4_0"),
        Recipe("IQ4_NL", 25, "IQ4_NL"),
        Recipe("IQ4_XS", 30, "IQ4_XS"),
        Recipe("Q3_K_L", 13, "Q3_K"),
        Recipe("Q3_K_M", 12, "Q3_K"),
        Recipe("Q3_K_S", 11, "Q3_K"),
        Recipe("Q2_K", 10, "Q2_K"),
    )
}

# Rows that are no whole number of the type's blocks of 256 get the nearest type with blocks of 32.
_SMALLER_BLOCKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def fitting(kind: str, cols: int) -> str:
    """``kind``, or what rows of ``cols`` weights get that are no whole number of its blocks."""
    for fmt in (kind, _SMALLER_BLOCKS.get(kind, kind)):
        if cols % quant.find(fmt).block_size == 0:
            return fmt
    return "F16"


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, in any case. Errors: ``InvalidArgument``."""
    recipe = RECIPES.get(name.upper())
    if recipe is None:
        raise InvalidArgument(f"unknown type {name!r}; known are {', '.join(RECIPES)}", code="unknown_type")
    return recipe
