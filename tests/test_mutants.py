"""The list of planted defects fits the source: `make mutants` plants them and runs the tests."""

from pathlib import Path

import pytest

import bayestune
from mutants.defect import Defect
from mutants.defects import DEFECTS

SOURCE, TESTS = Path(bayestune.__file__).parent.parent, Path(__file__).parent


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_has_one_place_and_tests(defect: Defect) -> None:
    assert (SOURCE / defect.file).read_text(encoding="utf-8").count(defect.before) == 1
    assert defect.before != defect.after
    assert (TESTS / defect.tests.partition(" ")[0]).is_file()


def test_names_are_distinct() -> None:
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
