"""A plan as a picture: quantisation by context, a block a cache type, coloured by whether it fits."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from pyengine.errors import InvalidArgument, UnsupportedError
from pyengine.files import replacing
from pyengine.planner import Plan, gib, tokens

_COLOURS = {"fits": "#b7e1c4", "tight": "#fbe3a1", "no": "#f2b8b5"}
_WORDS = {"fits": "fits", "tight": "tight", "no": "does not fit"}
_CELL_W, _CELL_H, _LEFT, _TOP, _GAP = 78, 30, 110, 64, 56  # pixels


def check_format(path: Path) -> None:
    """Errors: ``InvalidArgument`` for an unknown ending, ``UnsupportedError`` where a PNG's package is absent."""
    if path.suffix.lower() not in {".svg", ".png"}:
        raise InvalidArgument(f"{path.name}: pictures are .svg or .png", code="unknown_picture")
    if path.suffix.lower() == ".png":
        _figure_class()


def save(plan: Plan, path: Path) -> None:
    """Draws ``plan`` into an SVG or PNG file, by its ending, which must pass :func:`check_format`."""
    check_format(path)
    with replacing(path) as file:
        file.write(svg(plan).encode() if path.suffix.lower() == ".svg" else _png(plan))


def svg(plan: Plan) -> str:
    """The picture as SVG, without any dependency."""
    columns, rows = len(plan.contexts), len(plan.rows)
    block = _GAP + rows * _CELL_H
    width = _LEFT + columns * _CELL_W + 20
    height = _TOP + len(plan.kv_types) * block + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(plan.shape.name)}: memory in GiB</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="16" y="28" font-size="17" font-weight="600">{escape(plan.shape.name)}</text>',
        f'<text x="16" y="48" fill="#555">{escape(subtitle(plan))}</text>',
    ]
    for b, kv in enumerate(plan.kv_types):
        top = _TOP + b * block + _GAP
        out.append(f'<text x="16" y="{top - 10}" font-weight="600">KV cache {kv}</text>')
        for i, context in enumerate(plan.contexts):
            x = _LEFT + i * _CELL_W + _CELL_W // 2
            out.append(f'<text x="{x}" y="{top - 10}" text-anchor="middle" fill="#555">{tokens(context)}</text>')
        for r, row in enumerate(plan.rows):
            y = top + r * _CELL_H
            out.append(f'<text x="16" y="{y + 20}">{escape(row.quantisation)}</text>')
            for i, context in enumerate(plan.contexts):
                cell = plan.cell(row.quantisation, context, kv)
                x = _LEFT + i * _CELL_W
                out.append(
                    f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL_W - 2}" height="{_CELL_H - 2}" rx="3" '
                    f'fill="{_COLOURS[cell.verdict]}"><title>{_WORDS[cell.verdict]}</title></rect>'
                    f'<text x="{x + _CELL_W // 2}" y="{y + 20}" text-anchor="middle">{gib(cell.memory.total)}</text>'
                )
    for i, (verdict, colour) in enumerate(_COLOURS.items()):
        x, y = _LEFT + i * 110, height - 26
        out.append(f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{colour}"/>')
        out.append(f'<text x="{x + 20}" y="{y + 12}">{_WORDS[verdict]}</text>')
    return "\n".join([*out, "</svg>\n"])


def subtitle(plan: Plan) -> str:
    """What the colours are about."""
    where = "available on this machine" if plan.ram is None else f"available on a machine of {gib(plan.ram)}"
    return f"memory in GiB by quantisation and context; {gib(plan.available)} {where}"


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "a PNG needs the package matplotlib: pip install 'pyengine[plot]', or ask for an .svg",
            code="needs_matplotlib",
        ) from None
    return Figure


def _png(plan: Plan) -> bytes:
    from io import BytesIO

    columns, rows = len(plan.contexts), len(plan.rows)
    figure = _figure_class()(figsize=(1.6 + 0.85 * columns, (0.9 + 0.36 * rows) * len(plan.kv_types) + 0.8), dpi=150)
    blocks = figure.subplots(len(plan.kv_types), 1, squeeze=False)[:, 0]
    figure.suptitle(f"{plan.shape.name}\n{subtitle(plan)}", fontsize=10)
    for axes, kv in zip(blocks, plan.kv_types, strict=True):
        axes.set_title(f"KV cache {kv}", fontsize=9, loc="left")
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        axes.set_xticks([i + 0.5 for i in range(columns)], [tokens(c) for c in plan.contexts])
        axes.set_yticks([i + 0.5 for i in range(rows)], [row.quantisation for row in plan.rows])
        axes.tick_params(length=0, labelsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for r, row in enumerate(plan.rows):
            for i, context in enumerate(plan.contexts):
                cell = plan.cell(row.quantisation, context, kv)
                axes.fill([i, i + 1, i + 1, i], [r, r, r + 1, r + 1], color=_COLOURS[cell.verdict], ec="white")
                axes.text(i + 0.5, r + 0.5, gib(cell.memory.total), ha="center", va="center", fontsize=8)
    figure.tight_layout()
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
