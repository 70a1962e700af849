"""Time averaged decoding with K draws, and one text per draw, against plain decoding on a real language model.

    python benchmarks/generate.py --run RUN [--draws 10] [--tokens 32] [--pairs 5] [--json FILE]

RUN is the folder of a run of a causal language model. One prompt is continued by exactly --tokens tokens. "ratio" is
the median over rounds of the time of `bayestune.generate` with K draws, divided by that of transformers' own greedy
`generate` with the mean of the same adapter; K plain decodings in sequence would have the ratio K. "per_draw_ratio" is
the same for mode "per_draw", whose texts are also scored by all draws. "score_ratio" is the time in which
`bayestune.score` scores such a text with K draws, divided by that of one forward of its tokens.
"""

from pathlib import Path
from typing import Any

import torch
from options import parser, positive, publish
from pairs import ratio, seconds, spread

from bayestune import generate, score
from bayestune.experiment import load_run

PROMPT = "Question: Why do plants need light?\nAnswer:"


def main() -> None:
    made = parser(__doc__, pairs=5)
    made.add_argument("--run", type=Path, required=True)
    made.add_argument("--data", help="folder of data sets; default: that of the run")
    made.add_argument("--draws", type=positive, default=10)
    made.add_argument("--tokens", type=positive, default=32)
    options = made.parse_args()
    run = load_run(options.run, data=options.data)
    model, tokenizer = run.model.eval(), run.task.tokenizer
    limits = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
    inputs: Any = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    asked: dict[str, Any] = {"draws": options.draws, **limits}
    text = generate(run.posterior, tokenizer, [PROMPT], **asked).texts[0]
    whole: Any = tokenizer(PROMPT + text, return_tensors="pt").to(model.device)

    @torch.inference_mode()
    def plain() -> None:
        model.generate(**inputs, pad_token_id=tokenizer.eos_token_id, **limits)

    @torch.inference_mode()
    def forward() -> None:
        model(**whole)

    ways = {
        "plain": plain,
        "averaged": lambda: generate(run.posterior, tokenizer, [PROMPT], **asked),
        "per_draw": lambda: generate(run.posterior, tokenizer, [PROMPT], mode="per_draw", **asked),
        "score": lambda: score(run.posterior, tokenizer, [PROMPT], [text], draws=options.draws),
        "forward": forward,
    }
    times = seconds(ways, pairs=options.pairs, warmup=1, device=str(model.device))
    found = {
        "ratio": ratio(times["averaged"], times["plain"]),
        "quartiles": spread(times["averaged"], times["plain"]),
        "per_draw_ratio": ratio(times["per_draw"], times["plain"]),
        "score_ratio": ratio(times["score"], times["forward"]),
        "pairs": options.pairs,
        "draws": options.draws,
        "tokens": options.tokens,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "model": run.experiment.model,
        "milliseconds_per_token": {
            way: 1000 * torch.tensor(times[way]).median().item() / options.tokens for way in ("plain", "averaged")
        },
    }
    publish(found, options, device=str(model.device))


if __name__ == "__main__":
    main()
