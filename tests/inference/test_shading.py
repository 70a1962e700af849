"""Shaded texts: every piece is there, the most uncertain token is the darkest, and markup is text."""

import re

import torch

from bayestune.inference import Generation, shaded, shaded_html


def generation(pieces: list[str], epistemic: list[float]) -> Generation:
    values = torch.tensor(epistemic, dtype=torch.float64)
    return Generation(
        texts=("".join(pieces),),
        sequences=(torch.arange(len(pieces)),),
        pieces=(tuple(pieces),),
        draw_log_probs=(torch.full((2, len(pieces)), -1.0, dtype=torch.float64),),
        total=(values + 0.5,),
        aleatoric=(torch.full_like(values, 0.5),),
        finished=(True,),
        draws=2,
        seed=0,
    )


def test_a_terminal_shows_each_piece_and_shades_by_share() -> None:
    (text,) = shaded(generation(["a", " <b>", " c"], [0.0, 0.2, 0.1]))
    assert re.sub(r"\x1b\[[0-9;]*m", "", text) == "a <b> c"
    assert text.startswith("a\x1b[48;5;209m") and "\x1b[48;5;223m\x1b[38;5;16m c" in text


def test_a_page_has_every_figure_and_no_markup_of_the_text() -> None:
    page = shaded_html(generation(["a", " <b>"], [0.0, 0.2]), prompts=["1 < 2"])
    assert "<h2>1 &lt; 2</h2>" in page and "&lt;b&gt;" in page and "<b>" not in page
    assert 'rgba(214,96,77,1.00)" title="log p -1.000, total 0.700, aleatoric 0.500, epistemic 0.200 nats"' in page


def test_texts_without_uncertainty_or_tokens_are_plain() -> None:
    assert shaded(generation(["a", "b"], [0.0, 0.0])) == ["ab"]
    assert shaded(generation([], [])) == [""]
