"""The whole command line in one process that has no network. Started by test_offline.py.

    offline.py REPORT RESULTS

Works in the current folder, which holds llama/ and data/. REPORT gets, as JSON: exit codes by command, attempts to
reach the network, files opened for writing outside of the current folder, and the modules imported. RESULTS is a
folder of cells.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

CALLS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto")
attempts: list[str] = []
strayed: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse the network; note files that are written elsewhere. An audit hook: nothing can take it away again."""
    if event in CALLS:
        attempts.append(f"{event} {arguments[1:]}")
        raise OSError("there is no network")
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((os.getcwd() + os.sep, "/dev/", "/proc/")):
            strayed.append(path)


def main(report: str, results: str) -> None:
    sys.addaudithook(watch)
    from bayestune_cli.app import invoke

    train = ["train", "--model", "llama", "--data", "data", "--task", "colours", "--steps", "4", "--batch-size", "4"]
    train += ["--max-tokens", "200", "--draws", "2"]
    commands = {
        "train": [*train, "--checkpoint-steps", "2", "--output", "run"],
        "train with a temperature": [*train, "--temperature-split", "train", "--overwrite", "--output", "run2"],
        "evaluate": ["evaluate", "run", "--json", "--ood", "others"],
        "predict": ["predict", "run", "--input", "data/others/dev.jsonl", "--output", "answers.jsonl"],
        "generate": [
            "generate",
            "run",
            "--input",
            "data/prompts.jsonl",
            "--output",
            "texts.jsonl",
            "--max-new-tokens",
            "3",
        ],
        "acquire": ["acquire", "run", "--pool", "data/others/dev.jsonl", "--output", "next.jsonl"],
        "export": ["export", "run", "--output", "lora", "--draws", "1"],
        "go on from an export": [*train, "--method", "tfb", "--adapter", "lora/mean", "--output", "tfb"],
        "table": ["table", "table1", "--rebuild", "--results", str(Path(results).parent), "--output", "tables"],
        "report": ["report", results, "--output", "report.html"],
        "no such model": ["evaluate", "nowhere"],
        "a bad row": ["predict", "run", "--input", "data/bad.jsonl", "--output", "bad.jsonl"],
        "a wrong label": [*train, "--task", "wrong", "--output", "run3"],
    }
    codes = {name: invoke(command) for name, command in commands.items()}

    from transformers import AutoModelForCausalLM

    from bayestune import load_posterior, save_posterior

    model = load_posterior(AutoModelForCausalLM.from_pretrained("llama"), "run/posterior")
    save_posterior(model, "again")
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    found = {"codes": codes, "attempts": attempts, "strayed": strayed, "modules": modules}
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
