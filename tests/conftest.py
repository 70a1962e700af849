"""Set-up of the whole suite: offline, one thread, and every annotation of bayestune checked at run time."""

import datetime
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["bayestune", "bayestune_cli"], "beartype.beartype")  # before anything imports bayestune

from collections.abc import Callable  # noqa: E402
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
    parser.addoption(
        "--seed",
        type=int,
        default=datetime.date.today().toordinal(),
        help="seed of the nightly tests; default: the number of the day",
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed of nightly tests: {config.getoption('--seed')}"


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -k
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Write the tier and the properties of each test to the report, and let ``-k S01`` select by property."""
    for item in items:
        properties = [mark.args[0] for mark in item.iter_markers("property")]
        item.extra_keyword_matches.update(properties)
        item.user_properties += [("property", name) for name in properties]
        tier = next((name for name in ("nightly", "gpu") if item.get_closest_marker(name)), "commit")
        item.user_properties.append(("tier", tier))


@pytest.fixture
def nightly_seed(request: pytest.FixtureRequest) -> int:
    """A seed that changes from day to day; the head of the report says which."""
    return request.config.getoption("--seed")


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``figure(what, value, at_most=bound)``, or `at_least`: record a measured figure, and hold it to its bound."""

    def check(what: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        found = {"what": what, "value": float(value), "at_most": at_most, "at_least": at_least}
        record_property("figure", json.dumps(found))
        inside = value <= at_most if at_most is not None else at_least is not None and value >= at_least
        bound = f"at most {at_most}" if at_most is not None else f"at least {at_least}"
        assert inside, f"{what}: found {value}, expected {bound}"

    return check


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
