"""`bayestune demo`: compare plain LoRA and BLoB on the same rows with the same budget, offline."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bayestune import metrics
from bayestune.errors import ConfigError
from bayestune.experiment import Experiment, Result, Run, load_run, run, score_table
from bayestune.experiment.record import hardware, versions
from bayestune.files import write_json
from bayestune.inference import Prediction, draw
from bayestune.methods import Blob, Mle
from bayestune.tasks import AnyRow

DRAWS = 10
_SHARED: dict[str, Any] = {
    "task": "everyday",
    "eval_split": "test",
    "batch_size": 8,
    "lora_alpha": 16,
    "posterior_scale": 1.0,  # both methods train on all rows
    "draws": DRAWS,
}
SETTINGS: dict[str, dict[str, Any]] = {
    # Chosen on training rows only (100 to fit, 50 to look at), the same for both methods.
    "minilm": _SHARED | {"steps": 180, "learning_rate": 2e-3, "kl_schedule": "elbo", "kl_learning_rate": 0.03},
    # Not tuned; few enough updates for a demo of minutes.
    "smollm2": _SHARED
    | {"steps": 30, "learning_rate": 1e-3, "scoring": "text", "prompt": "paper", "max_tokens": 160, "prior_std": 1.0},
}
"""The settings, by model."""
QUESTIONS = (
    "What do bees make from nectar?",
    "Which planet do we live on?",
    "Why do we see lightning before we hear thunder?",
)
PLAIN, BAYES = Mle.name, Blob.name
MEAN, AVERAGED = f"{BAYES}_n0", f"{BAYES}_n{DRAWS}"
NAMES = {PLAIN: Mle.label, MEAN: f"{Blob.label} N=0", AVERAGED: f"{Blob.label} N={DRAWS}"}
FILES = {PLAIN, BAYES, "result.json", "reliability.png", "reliability.svg"}
LITTER = {f".{method}.{kind}" for method in (PLAIN, BAYES) for kind in ("lock", "before")}
"""What a killed demo leaves beside its runs: their locks, and the runs that they were to replace."""
SHOWN = 5


def run_demo(output: str | Path, *, model: str = "minilm", seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Train both methods, print how they compare, and write result.json, reliability.png and .svg to `output`.

    The model is one of `SETTINGS`; a language model also answers free questions in words under each draw.

    The folders `output/mle` and `output/blob` are ordinary runs: `bayestune predict output/blob` answers with the
    posterior trained here. Returns the content of result.json.

    Raises:
        ConfigError: the model package is not installed, or `output` holds something else.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from bayestune.report.plots import reliability_diagram  # fails before training if the extra "report" is missing

    started, output = time.monotonic(), Path(output)
    _check_output(output, overwrite)
    results = {method: _train(model, method, seed, output / method, overwrite) for method in (PLAIN, BAYES)}
    scores = {key: value for result in results.values() for key, value in result.scores.items()}
    predictions = {key: value for result in results.values() for key, value in result.predictions.items()}
    _section(
        f"Same {SETTINGS[model]['steps']} updates on the same training questions, seed {seed}; scored on the test "
        "questions"
    )
    print(score_table({NAMES[key]: value for key, value in scores.items()}))
    _section(f"The first {SHOWN} test questions: probability of each choice (* is right), epistemic part in nats")
    trained = load_run(output / BAYES)
    _show_questions(trained.task.rows("test")[:SHOWN], predictions[PLAIN], predictions[AVERAGED])
    _section("Questions from subjects that were not trained on")
    ood = {key: _out_of_distribution(output / method, predictions[key]) for method, key in _BEST.items()}
    _show_ood(ood)
    words = _in_words(trained, seed) if trained.task.generates else {}
    labeled = {NAMES[key]: (predictions[key].log_probs, predictions[key].labels) for key in NAMES}
    curves = {name: (log_probs, labels) for name, (log_probs, labels) in labeled.items() if labels is not None}
    reliability_diagram(curves, output / "reliability.png", output / "reliability.svg")
    content = {
        "seed": seed,
        "methods": {key: value.as_dict() for key, value in scores.items()},
        "ood": ood,
        **({"words": words} if words else {}),
        "settings": results[BAYES].experiment.as_dict(),
        "command": _command(model, seed),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(output / "result.json", content)
    print(
        f"\n{output}: result.json, reliability.png, reliability.svg, {PLAIN}/, {BAYES}/ ({content['seconds']:.0f} s)"
    )
    return content


_BEST = {PLAIN: PLAIN, BAYES: AVERAGED}


def _train(model: str, method: str, seed: int, output: Path, overwrite: bool) -> Result:
    settings = {"model": model, **SETTINGS[model], "method": method, "seed": seed}
    experiment = Experiment.from_dict(settings, where="demo")
    return run(experiment, output, overwrite=overwrite, command=_command(model, seed), progress=True)


def _command(model: str, seed: int) -> list[str]:
    return ["bayestune", "demo", "--model", model, "--seed", str(seed)]


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output}: found a file, expected a folder or nothing.")
    found = {path.name for path in output.iterdir()} - LITTER if output.is_dir() else set()
    if found - FILES:
        raise ConfigError(f"output {output}: found {min(found - FILES)}, which no demo wrote; choose another folder.")
    if found and not overwrite:
        raise ConfigError(f"output {output}: the folder is not empty; choose another, or pass --overwrite.")


def _section(title: str) -> None:
    print(f"\n{title}\n")


def _show_questions(rows: Sequence[AnyRow], mle: Prediction, blob: Prediction) -> None:
    for i, row in enumerate(rows):
        assert row.id == mle.ids[i] == blob.ids[i]
        print(row.texts[0][1])
        for choice, text in enumerate(text for field, text in row.texts if field == "choices"):
            mark = "*" if choice == row.target else " "
            print(f"  {mark} {text:<40} MLE {mle.probs[i, choice]:.2f}   BLoB {blob.probs[i, choice]:.2f}")
        print(f"    epistemic {blob.epistemic[i]:.3f} of total {blob.total[i]:.3f} nats\n")


def _out_of_distribution(folder: Path, known: Prediction) -> dict[str, int | float]:
    """Return the mean uncertainty on known and unknown subjects (nats), and how well it separates them (AUROC)."""
    trained = load_run(folder)
    unknown = trained.predict(trained.task.rows("ood"), draws=known.draws, progress=True)
    positive = torch.tensor([False] * len(known.ids) + [True] * len(unknown.ids))
    found: dict[str, int | float] = {"rows": len(unknown.ids)}
    for name, (a, b) in {
        "total": (known.total, unknown.total),
        "epistemic": (known.epistemic, unknown.epistemic),
    }.items():
        if name == "epistemic" and known.draws == 0:
            continue
        found |= {name: a.mean().item(), f"ood_{name}": b.mean().item()}
        found[f"auroc_{name}"] = metrics.auroc(torch.cat([a, b]), positive)
    return found


def _show_ood(ood: Mapping[str, Mapping[str, int | float]]) -> None:
    for key, found in ood.items():
        for name in ("epistemic", "total"):
            if name in found:
                means = f"{found[name]:.3f} nats on test, {found[f'ood_{name}']:.3f} on the {found['rows']} others"
                print(f"{NAMES[key]:<10} mean {name:<9} {means}; AUROC {found[f'auroc_{name}']:.3f}")


def _in_words(trained: Run, seed: int) -> dict[str, dict[str, int]]:
    """Return how many draws give each answer to each of the free questions."""
    _section(f"Free questions: what each of {DRAWS} draws answers in words")
    tokenizer: Any = trained.task.tokenizer
    found: dict[str, dict[str, int]] = {}
    for question in QUESTIONS:
        chat = [{"role": "system", "content": "Answer in one or two words."}, {"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = inputs.to(trained.model.device)
        answers: Counter[str] = Counter()
        for index in range(DRAWS):
            with draw(trained.model, index=index, seed=seed):
                ids = trained.model.generate(**inputs, max_new_tokens=16, do_sample=False)
            new = ids[0, inputs["input_ids"].shape[1] :]
            answers[" ".join(tokenizer.decode(new, skip_special_tokens=True).split())] += 1
        found[question] = dict(answers.most_common())
        print(question)
        for answer, count in found[question].items():
            print(f"  {count:>2} of {DRAWS}  {answer}")
    return found
