"""Compare zero-shot answers scored by text with those of lm-evaluation-harness's own arc_easy, row by row.

    python benchmarks/lm_eval_agreement.py --data DIR [--rows 100] [--json FILE]

SmolLM2 answers the first rows of ARC-Easy's test split. Needs lm-eval (extra `eval`). Prints one JSON object with the
accuracies of both, the number of rows on which they differ, and the largest difference of a log-probability.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import evaluator, tasks  # pyright: ignore[reportMissingImports]
from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from options import parser, positive, publish
from transformers import AutoModelForCausalLM

from bayestune.experiment.backbone import find_backbone
from bayestune.tasks import Prompt, Row, text_choice

OWN = Path(tasks.__file__).parent / "arc" / "arc_easy.yaml"


def main() -> None:
    made = parser(__doc__, pairs=1)
    made.add_argument("--data", required=True, help="folder of the data sets")
    made.add_argument("--rows", type=positive, default=100, help="rows of the test split")
    options = made.parse_args()
    backbone = find_backbone("smollm2")
    model = AutoModelForCausalLM.from_pretrained(backbone.source).eval()
    task = text_choice("arc_easy", backbone.tokenizer, data=options.data, prompt=Prompt(scoring="text"))
    rows: list[Any] = task.rows("test")[: options.rows]
    theirs = by_lm_eval(model, backbone.tokenizer, rows)
    ours = log_probs(model, task, rows)
    lengths = [torch.tensor([len(choice.encode()) for choice in row.choices]) for row in rows]
    per_byte = [scores / length for scores, length in zip(ours, lengths, strict=True)]
    found = {
        "rows": len(rows),
        "lm_eval": {name: sum(each[name] for each in theirs) / len(rows) for name in ("acc", "acc_norm")},
        "bayestune": {"text": accuracy(ours, rows), "text_per_byte": accuracy(per_byte, rows)},
        "rows_that_differ": {
            "text": differing(ours, rows, [each["acc"] for each in theirs]),
            "text_per_byte": differing(per_byte, rows, [each["acc_norm"] for each in theirs]),
        },
        "largest_difference": max(
            (scores - torch.tensor([choice[0] for choice in each["filtered_resps"]])).abs().max().item()
            for scores, each in zip(ours, theirs, strict=True)
        ),
    }
    publish(found, options)


def log_probs(model: torch.nn.Module, task: Any, rows: list[Row]) -> list[torch.Tensor]:
    """Return the summed log-probabilities of the choices' texts for each row, not normalized over choices."""
    examples, found = task.examples(rows, model), []
    with torch.no_grad():
        for start in range(0, len(rows), 8):
            part = examples[start : start + 8]
            outputs = task.outputs(model, task.collate(part))
            found += [line[: len(e["branches"])].double() for line, e in zip(outputs, part, strict=True)]
    return found


def right(scores: torch.Tensor, row: Row) -> bool:
    return int(scores.argmax()) == row.answer


def accuracy(scores: list[torch.Tensor], rows: list[Row]) -> float:
    return sum(map(right, scores, rows)) / len(rows)


def differing(scores: list[torch.Tensor], rows: list[Row], theirs: list[float]) -> int:
    return sum(right(line, row) != bool(other) for line, row, other in zip(scores, rows, theirs, strict=True))


def by_lm_eval(model: Any, tokenizer: Any, rows: list[Row]) -> list[dict[str, Any]]:
    """Return lm-eval's samples for its own arc_easy task, on these rows instead of those of the Hub."""
    config = yaml.safe_load(OWN.read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        letters = [chr(ord("A") + i) for i in range(26)]
        path.write_text(
            "".join(
                json.dumps(
                    {
                        "id": row.id,
                        "question": row.question,
                        "choices": {"text": list(row.choices), "label": letters[: len(row.choices)]},
                        "answerKey": letters[row.answer or 0],
                    }
                )
                + "\n"
                for row in rows
            )
        )
        changed = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(path)}}}
        changed |= {"training_split": None, "validation_split": None}
        task = ConfigurableTask(config={**config, **changed})
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
        found = evaluator.evaluate(lm, {"arc_easy": task}, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["arc_easy"], key=lambda sample: sample["doc_id"])
    assert [sample["doc"]["id"] for sample in samples] == [row.id for row in rows]
    return samples


if __name__ == "__main__":
    main()
