"""A pytest plugin, ``-p mutants.plugin --defect NAME``: plants a defect before any test is imported."""

import pytest

from mutants.defects import DEFECTS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--defect", choices=DEFECTS, help="the defect to plant")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--defect")
    if name is not None:
        DEFECTS[name].plant()
