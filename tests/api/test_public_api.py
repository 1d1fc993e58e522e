"""What a user can name does not change by accident: public names, commands and recipe keys are those of a snapshot."""

import difflib
from pathlib import Path

import pytest
import surface

import keras_t5gemma as kt

SNAPSHOT = Path(__file__).with_name("public_api.txt")
ADVICE = (
    "The public surface has changed. Add a CHANGELOG line and update this file: "
    "`python docs/surface.py tests/api/public_api.txt`"
)


def test_public_surface_is_that_of_the_snapshot():
    expected, found = SNAPSHOT.read_text(encoding="utf-8").splitlines(), surface.snapshot().splitlines()
    changes = list(difflib.unified_diff(expected, found, "public_api.txt", "the source", lineterm="", n=0))
    if changes:
        pytest.fail("\n".join([ADVICE, *changes]), pytrace=False)


def test_lazy_table_and_imports_for_type_checkers_say_the_same():
    assert surface.imported_for_type_checkers() == kt._MODULES


def test_package_says_that_it_has_types():
    assert (surface.PACKAGE / "py.typed").is_file()


def test_removed_name_is_told_with_what_to_do(monkeypatch):
    names = surface.public_names()
    monkeypatch.setattr(surface, "public_names", lambda: [name for name in names if name.name != "UL2"])
    with pytest.raises(pytest.fail.Exception, match=r"CHANGELOG(.|\n)*-UL2\(encoder_length"):
        test_public_surface_is_that_of_the_snapshot()
