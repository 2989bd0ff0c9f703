"""Which type each tensor gets."""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import quant


@dataclass(frozen=True)
class Recipe:
    """What ``--type`` stands for.

    Attributes:
        name: as on the command line.
        file_type: ``general.file_type``.
        type: format of two-dimensional weights.
        head: format of the matrix that makes the logits: ``output.weight``, or the embedding where it is tied.
    """

    name: str
    file_type: int
    type: str
    head: str

    def choose(self, name: str, shape: tuple[int, ...], tied: bool) -> tuple[str, str]:
        """(format, note) of a tensor; the note says why it is not the usual one, or is empty.

        Norms and biases stay F32. A row that is no whole number of blocks falls back to F16.
        """
        if len(shape) < 2:
            return "F32", ""
        is_head = name == ("token_embd.weight" if tied else "output.weight")
        chosen = self.head if is_head else self.type
        block = quant.find(chosen).block_size
        if shape[-1] % block:
            return "F16", f"rows of {shape[-1]} are no multiple of {block}"
        return chosen, "makes the logits" if chosen != self.type else ""


# Q4_0: GGUF files usually keep the head in Q6_K; Q8_0 costs 1.9 bits a weight more there and loses less.
RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("f32", 0, "F32", "F32"),
        Recipe("f16", 1, "F16", "F16"),
        Recipe("bf16", 32, "BF16", "BF16"),
        Recipe("q8_0", 7, "Q8_0", "Q8_0"),
        Recipe("q4_0", 2, "Q4_0", "Q8_0"),
    )
}
