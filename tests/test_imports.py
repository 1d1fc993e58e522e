"""The layers of the package: who may import whom, and what an import costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keras_t5gemma

PACKAGE = Path(keras_t5gemma.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"
# A module imports only from a lower rank or from its own folder. Everything in a folder has the folder's rank. From the
# table of docs/architecture.md: a rank, then modules and folders.
RANKS = {
    name: int(rank)
    for rank, names in re.findall(r"^\| (\d+) \| (.+?) \|", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    for name in re.findall(r"`(\w+)(?:\.py|/)`", names)
}
# What these import at module level must not need Keras: they answer in a fraction of a second, or run in workers.
WITHOUT_KERAS = (
    "",
    "config",
    "presets",
    "cli",
    "checkpoints.hugging_face.reader",
    "checkpoints.tensor_table",
    "data",
    "recipes.reading",
    "training.callbacks.plots",
)
BACKENDS = ("keras", "keras_hub", "jax", "tensorflow", "torch")


def modules():
    return {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path):
    """Every module name imported anywhere in a file, functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert "*" not in {alias.name for alias in node.names}, f"{path}: star import"
            # `from package import module` names a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_and_folder_has_a_rank():
    assert set(RANKS) == {name.partition(".")[0] for name in modules().values()} - {"__init__"}


@pytest.mark.parametrize(("path", "name"), modules().items(), ids=modules().values())
def test_module_imports_only_from_a_lower_rank_or_its_own_folder(path, name):
    folder = name.partition(".")[0]
    if folder == "__init__":
        return
    for imported in imports(path):
        package, _, rest = imported.partition(".")
        if package != "keras_t5gemma":
            continue
        other = rest.partition(".")[0]
        if other in RANKS:
            assert other == folder or RANKS[other] < RANKS[folder], f"{name} (rank {RANKS[folder]}) imports {imported}"
        else:
            # The package itself: a public name, which may be of any rank.
            assert folder in ("demo", "cli"), f"{name} imports {imported} from the top of the package"


@pytest.mark.parametrize(("path", "name"), modules().items(), ids=modules().values())
def test_module_imports_nothing_private_of_keras(path, name):
    private = [imported for imported in imports(path) if imported.startswith(("keras.src", "keras_hub.src"))]
    assert not private, f"{name} imports {private}"


@pytest.mark.parametrize("name", WITHOUT_KERAS)
def test_module_without_keras_imports_no_backend(name):
    module = f"keras_t5gemma.{name}".rstrip(".")
    code = f"import sys, {module}; print([name for name in {BACKENDS} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in keras_t5gemma.__all__ if name != "__version__"])
def test_public_name_is_the_one_its_module_defines(name):
    assert getattr(keras_t5gemma, name) is not None
    assert name in dir(keras_t5gemma)


def test_unknown_public_name_names_the_known_ones():
    with pytest.raises(AttributeError, match="T5GemmaSeq2SeqLM"):
        _ = keras_t5gemma.T5GemaSeq2SeqLM
