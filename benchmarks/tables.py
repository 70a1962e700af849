"""Make the tables of the README and the docs from results/*.json; nothing in them is typed by hand.

python benchmarks/tables.py            # write the parts between markers, docs/width.md, decoder.md and other_data.md
python benchmarks/tables.py --check    # exit with 1 if they differ from what the records give
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoder_page
import other_data
import widths_page
import worth
from options import parser
from over_seeds import spread

from bayestune.tables import read_cells
from bayestune.tables.layouts import layout, line_keys, line_label

ROOT = Path(__file__).parent.parent
METRICS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier"}
NAMES = {"mle": "plain LoRA (MLE)", "blob_n0": "BLoB, mean (N=0)", "blob_n10": "BLoB, N=10"}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--check", action="store_true")
    options = made.parse_args()
    pages: dict[str, dict[str, Callable[[], str]]] = {
        "README.md": {"real": real_table, "decoder": decoder_table},
        "docs/serving.md": {"cost": serving_table, "distil": distil_table},
        "docs/results.md": {
            "worth": worth.table,
            "demo": demo_table,
            "tuning": tuning_table,
            "methods": methods_table,
        },
    }
    for name, tables in pages.items():
        before = after = (ROOT / name).read_text(encoding="utf-8")
        for marker, make in tables.items():
            after = between(after, marker, make())
        finish(name, before, after, check=options.check)
    for name, make in {"width": widths_page.page, "decoder": decoder_page.page, "other_data": other_data.page}.items():
        before = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        finish(f"docs/{name}.md", before, make(), check=options.check)


def finish(name: str, before: str, after: str, *, check: bool) -> None:
    """Write a page; with `check`, exit if it would change."""
    if check and after != before:
        sys.exit(f"{name}: a table differs from results/; run benchmarks/tables.py")
    (ROOT / name).write_text(after, encoding="utf-8")


def between(text: str, name: str, table: str) -> str:
    """Return `text` with the part between the markers of `name` replaced by `table`."""
    begin, end = f"<!-- {name}: made by benchmarks/tables.py -->\n", f"<!-- end {name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"found no pair of markers for {name!r}")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def decoder_table() -> str:
    """Return four lines of the comparison on a language model, from results/decoder."""
    records = decoder_page.read_records()
    lines = [("mle", "mle"), ("mle", "mle_temperature"), ("blob", "blob_n10"), ("blob", "blob_n10_temperature")]
    return "\n".join(decoder_page.score_lines(records, lines)) + "\n"


def serving_table() -> str:
    """Return one line per record of results/serving."""
    heads = ["run", "draws", "rows", "difference to `predict`", "client / `predict`, time", "draw / base, time"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for record in load("serving"):
        run = f"{record['model']}, {record['task']}, {record['scoring']}"
        found = [
            f"{record['difference']:.1e}",
            *(f"{record[key]:.1f}" for key in ("client_by_predict", "draw_by_base")),
        ]
        lines.append(f"| {run} | {record['draws']} | {record['rows']} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def distil_table() -> str:
    """Return mean and standard deviation over seeds per base model and data set, from results/distil/*.json."""
    answers = {"teacher": "10 draws", "mean": "the mean", "student": "distilled"}
    scores = [f"{score}, {each}" for score in ("NLL", "ECE") for each in answers.values()]
    less = [f"NLL, distilled minus {answers[who]}, by seed" for who in ("teacher", "mean")]
    heads = ["model, data set", "rows with and without labels", *scores, *less]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    records = load("distil")
    for model, task in sorted({(record["model"], record["task"]) for record in records}):
        mine = [record for record in records if (record["model"], record["task"]) == (model, task)]
        cells = [" and ".join(str(mine[0]["rows"][name]) for name in ("train", "unlabelled"))]
        cells += [spread(r["scores"][who][m] for r in mine) for m in ("nll", "ece_corrected") for who in answers]
        cells += [
            ", ".join(_with_ends(r["seed"], r["nll_difference"][who]) for r in mine) for who in ("teacher", "mean")
        ]
        lines.append(f"| {model}, {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_ends(seed: int, less: dict[str, float]) -> str:
    return f"{seed}: {less['mean']:+.3f} [{less['low']:+.3f}, {less['high']:+.3f}]"


def demo_table() -> str:
    """Return one line per seed and method, from results/demo/seed*.json."""
    lines = [f"| seed | method | {' | '.join(METRICS.values())} |", "|---|---|---|---|---|---|"]
    for record in load("demo"):
        for method, scores in record["methods"].items():
            cells = [with_interval(scores, name) for name in METRICS]
            lines.append(f"| {record['seed']} | {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_interval(scores: dict, name: str) -> str:
    """Return a score with its interval. The plain ECE has none, because its interval would be biased."""
    ends = "" if name == "ece" else f" [{', '.join(f'{end:.3f}' for end in scores['intervals'][name])}]"
    return f"{scores[name]:.3f}{ends}"


def real_table() -> str:
    """Return mean and standard deviation over seeds per task, budget and method, from results/real/*.json."""
    heads = ["task", "updates", "method", *METRICS.values(), "rows", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    records = load("real")
    for task, steps in sorted({(record["task"], record["steps"]) for record in records}):
        for method, name in NAMES.items():
            runs = [r["methods"] for r in records if (r["task"], r["steps"]) == (task, steps)]
            found = [scores[method] for scores in runs if method in scores]
            if found:
                cells = [spread(scores[m] for scores in found) for m in METRICS]
                lines.append(
                    f"| {task} | {steps} | {name} | {' | '.join(cells)} | {found[0]['rows']} | {len(found)} |"
                )
    return "\n".join(lines) + "\n"


def tuning_table() -> str:
    """Return one line per setting, scored on rows cut from train, from results/tuning/*.json."""
    heads = ["method", "learning rate", "KL weights", "KL rate", *METRICS.values(), "rows"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for record in load("tuning"):
        settings = record["experiment"]
        key = max(record["methods"])  # "blob_n10" rather than "blob_n0"
        scores = record["methods"][key]
        kl = ["", ""] if key == "mle" else [settings["kl_schedule"], f"{settings['kl_learning_rate']}"]
        cells = [NAMES[key], f"{settings['learning_rate']}", *kl, *(f"{scores[m]:.3f}" for m in METRICS)]
        lines.append(f"| {' | '.join(cells)} | {scores['rows']} |")
    return "\n".join(lines) + "\n"


def methods_table() -> str:
    """Return mean and standard deviation over seeds per data set and method, from the cells of table 1."""
    heads = ["data set", "updates", "method", *METRICS.values(), "AURC", "rows", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    cells = read_cells(ROOT / "results" / "table1")
    for column in layout("table1").columns:
        for method, draws in line_keys(cells):
            found = [c for c in cells if (c["task"], c["method"], c["draws"]) == (column.task, method, draws)]
            if found:
                scores = [spread(cell[m] for cell in found) for m in (*METRICS, "aurc")]
                places = [column.label, found[0]["steps"], line_label(method, draws), *scores, found[0]["rows"]]
                lines.append(f"| {' | '.join(map(str, places))} | {len(found)} |")
    took = {(cell["method"], cell["seed"]): cell["seconds"] for cell in cells if cell["task"] == "openbookqa"}
    lines.append(f"\nThe {len(took)} runs on OpenBookQA took {sum(took.values()) / 3600:.1f} hours on one core.")
    return "\n".join(lines) + "\n"


def load(group: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "results" / group).glob("*.json"))]


if __name__ == "__main__":
    main()
