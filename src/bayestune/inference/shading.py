"""Shade the uncertain tokens of texts: `shaded` for a terminal, `shaded_html` as one HTML page."""

import html
from collections.abc import Sequence
from typing import Literal

from bayestune.errors import ConfigError
from bayestune.inference.generation import Generation

Shade = Literal["total", "aleatoric", "epistemic"]
_TERMINAL = ("", "\x1b[48;5;230m", "\x1b[48;5;223m", "\x1b[48;5;216m", "\x1b[48;5;209m")
"""Backgrounds of 256-color terminals, from certain to uncertain."""
_DARK, _PLAIN = "\x1b[38;5;16m", "\x1b[0m"


def shaded(generation: Generation, *, by: Shade = "epistemic") -> list[str]:
    """Return each text for a terminal; a token is darker the closer its uncertainty is to the largest of all tokens.

    Args:
        generation: the texts and the uncertainty of their tokens.
        by: the uncertainty that sets the shade.
    """
    levels = _levels(generation, by)
    return [
        "".join(
            f"{_TERMINAL[round(4 * level)]}{_DARK}{piece}{_PLAIN}" if round(4 * level) else piece
            for piece, level in zip(pieces, several, strict=True)
        )
        for pieces, several in zip(generation.pieces, levels, strict=True)
    ]


def shaded_html(generation: Generation, *, prompts: Sequence[str] = (), by: Shade = "epistemic") -> str:
    """Return one HTML page of shaded texts; pointing at a token shows its figures.

    Args:
        generation: the texts and the uncertainty of their tokens.
        prompts: a heading for each text.
        by: the uncertainty that sets the shade.
    """
    if prompts and len(prompts) != len(generation.texts):
        raise ConfigError(f"prompts: found {len(prompts)}, expected {len(generation.texts)}, one for each text.")
    figures = zip(generation.log_probs, generation.total, generation.aleatoric, generation.epistemic, strict=True)
    levels, parts = _levels(generation, by), []
    for i, (pieces, several) in enumerate(zip(generation.pieces, figures, strict=True)):
        heading = f"<h2>{html.escape(str(prompts[i]))}</h2>" if prompts else ""
        spans = [
            f'<span style="background:rgba(214,96,77,{level:.2f})" title="log p {log_prob:.3f}, total {total:.3f}, '
            f'aleatoric {aleatoric:.3f}, epistemic {epistemic:.3f} nats">{html.escape(piece)}</span>'
            for piece, level, log_prob, total, aleatoric, epistemic in zip(
                pieces, levels[i], *(values.tolist() for values in several), strict=True
            )
        ]
        parts.append(f"{heading}<p>{''.join(spans)}</p>")
    largest = max((float(values.max()) for values in getattr(generation, by) if len(values)), default=0.0)
    note = f"Darker: more {by} uncertainty; the darkest token has {largest:.3f} nats."
    style = "body{font:16px/1.6 sans-serif;max-width:46em;margin:2em auto}p{white-space:pre-wrap}h2{font-size:1em}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Uncertain tokens</title><style>{style}</style>'
        f"<p>{note}</p>{''.join(parts)}</html>\n"
    )


def _levels(generation: Generation, by: Shade) -> list[list[float]]:
    """Return the uncertainty of each token, divided by the largest of all tokens."""
    values = getattr(generation, by)
    largest = max((float(each.max()) for each in values if len(each)), default=0.0)
    return [[value / largest if largest > 0 else 0.0 for value in each.tolist()] for each in values]
