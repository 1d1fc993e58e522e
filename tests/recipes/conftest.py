"""What the recipe `tiny` trains on: a Gemma 2, a corpus and held-out text, in the folder the command runs in."""

import contextlib

import pytest
from helpers.tiny_recipe import write_tiny_recipe


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The folder."""
    return write_tiny_recipe(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def here(tiny_folder):
    """The folder, which is the current one for as long as a file's tests run."""
    with contextlib.chdir(tiny_folder):
        yield tiny_folder
