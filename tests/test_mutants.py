"""The planted defects replace what exists and name tests that exist; `make mutants` plants them and runs the tests."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mutants import defect
from mutants.defects import DEFECTS

TESTS = Path(__file__).parent


def test_every_defect_replaces_what_exists_and_names_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []
    monkeypatch.setattr(defect, "_put", lambda owner, attribute, make: replaced.append(attribute))
    for planted in DEFECTS.values():
        before = len(replaced)
        planted.plant()  # raises if nothing has that name
        assert len(replaced) > before, planted.name
        assert (TESTS / planted.tests).is_file(), planted.name
    assert len(DEFECTS) >= 60


def test_the_wrong_one_stands_wherever_the_right_one_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thing:
        def method(self) -> int:
            return 1

        @property
        def value(self) -> int:
            return 1

        @classmethod
        def made(cls) -> int:
            return 1

    def right() -> int:
        return 1

    home, user = ModuleType("some_home"), ModuleType("some_user")
    home.right, home.Thing, user.under_another_name = right, Thing, right  # type: ignore[attr-defined]
    for module in (home, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("right", "Thing.method", "Thing.value", "Thing.made"):
        defect.wrap(f"some_home.{name}", lambda known: lambda *args: known(*args) + 1)
    found: Any = (home, user)
    assert (found[0].right(), found[1].under_another_name()) == (2, 2)
    assert (Thing().method(), Thing().value, Thing.made()) == (2, 2, 2)
    with pytest.raises(AttributeError, match="defines no other"):
        defect.wrap("some_home.other", lambda known: known)
