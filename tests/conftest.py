"""Set-up of the whole suite: offline, one thread, and every annotation of bayestune checked at run time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("bayestune", "beartype.beartype")  # before anything imports bayestune

from pathlib import Path  # noqa: E402

import peft  # noqa: E402, F401  here, where warnings are no errors yet: what it and its kin warn of on import is theirs
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        metavar="DIR",
        default=os.environ.get("BAYESTUNE_DATA"),
        help="folder of benchmark data sets, DIR/<dataset>/<split>.jsonl.gz (or the variable BAYESTUNE_DATA)",
    )


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder given by --data; tests that need it are skipped without it."""
    folder = request.config.getoption("--data")
    if folder is None:
        pytest.skip("needs the benchmark data sets: pytest --data DIR, or set BAYESTUNE_DATA")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"--data {path}: no such folder")
    return path
