"""Command-line options that the benchmarks share, and the record that each of them prints and writes."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pairs import header

from bayestune.files import write_json


def parser(doc: str | None, *, pairs: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the docstring as help; if a number of rounds is given, it has --json and --pairs."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if pairs is not None:
        made.add_argument("--pairs", type=positive, default=pairs, help="rounds of the measurement")
        add_json(made)
    return made


def add_json(made: argparse.ArgumentParser) -> None:
    """Add the option --json."""
    made.add_argument("--json", type=new_file, help="also write the record to this file")


def add_machine(made: argparse.ArgumentParser, *, shape: str, gpu_shape: str, warmup: int) -> None:
    """Add the options --device, --shape (a name as in `shapes`) and --warmup."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=usable_device, default=default)
    made.add_argument("--shape", help=f"default: {shape}, or {gpu_shape} on a GPU")
    made.add_argument("--warmup", type=int, default=warmup, help="rounds before the measurement")


def publish(record: Mapping[str, Any], options: argparse.Namespace, *, device: str = "cpu") -> None:
    """Print the record with the command, date, versions and hardware, and write it if --json asks for it."""
    whole = {**record, **header(device)}
    print(json.dumps(whole))
    if options.json:
        write_json(options.json, whole)


def positive(text: str) -> int:
    """Parse a number that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, at least 1")
    return int(text)


def new_file(text: str) -> Path:
    """Parse a file that can be written when the measurement is done."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a file in a folder that exists")
    return path


def usable_device(text: str) -> str:
    """Parse a device that this machine has."""
    if text != "cpu" and not (text.startswith("cuda") and torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected cpu, or cuda if there is a GPU")
    return text
