"""Classify your own texts: train a posterior on labeled texts, and predict new ones with their uncertainty.

    python examples/own_rows.py [MODEL]

MODEL is a folder or a Hugging Face id of an encoder; by default the built-in `minilm`.
"""

import json
import sys
import tempfile
from pathlib import Path

from bayestune.experiment import Experiment, load_run, run, score_table
from bayestune.tasks import read_rows

GOOD, BAD = ("a joy to read", "clear and useful", "works as promised"), ("a waste of time", "broken", "no help at all")


def write_rows(path: Path, things: tuple[str, ...]) -> None:
    """Write one labeled row per thing and verdict; the label is 1 for good and 0 for bad."""
    rows = [(thing, verdict, int(verdict in GOOD)) for thing in things for verdict in (*GOOD, *BAD)]
    with path.open("w", encoding="utf-8") as file:
        for number, (thing, verdict, label) in enumerate(rows):
            text = f"This {thing} is {verdict}."
            file.write(json.dumps({"id": str(number), "text": text, "label": label}) + "\n")


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "reviews").mkdir()
    write_rows(folder / "reviews" / "train.jsonl", ("book", "lamp", "course", "phone"))
    write_rows(folder / "reviews" / "dev.jsonl", ("film", "chair"))

    model = sys.argv[1] if len(sys.argv) > 1 else "minilm"
    experiment = Experiment(
        model=model, task="reviews", data=str(folder), method="blob", steps=30, batch_size=8, learning_rate=2e-3,
        max_tokens=128,
    )  # fmt: skip
    print(score_table(run(experiment, folder / "run").scores))

    (folder / "new.jsonl").write_text(json.dumps({"id": "new", "text": "This pan is a joy to use."}) + "\n")
    rows = read_rows(folder / "new.jsonl", labelled=False)
    for record in load_run(folder / "run").predict(rows, draws=10).records(rows):
        print(record)


if __name__ == "__main__":
    main()
