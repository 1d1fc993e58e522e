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
    "hub",
    "cli",
    "checkpoints.hugging_face.reader",
    "checkpoints.tensor_table",
    "data",
    "recipes.reading",
    "training.callbacks.plots",
)
BACKENDS = ("keras", "keras_hub", "jax", "tensorflow", "torch")
# Where a backend may be named: what differs by backend or device lives here.
HOMES = (
    "kernels",
    "training.steps",
    "training.optimizers",
    "training.checkpointing",
    "training.batches.streams",
    "inference.programs",
    "inference.buckets",
    "inference.decoding.chunks",
    "inference.samplers.top_k_top_p",
    "checkpoints.to_device",
    "checkpoints.processes",
    "recipes.devices",
    "demo.run",
    "exports.saved_model",
    "exports.tensorflow_",
    "evaluation.model_info",
    "reinforcement.run_folder",
    "cli",
    "_keras_internals",
)
# Attributes that Keras, keras-hub, Grain and PyTorch do not promise, and where they are used beside `_keras_internals`.
# Checked with Keras 3.15.1, keras-hub 0.32, Grain 0.2 and PyTorch 2.13.
PRIVATE_OF_OTHERS = {
    "caller_warnings": {"_getframe", "_current_frames"},  # of `sys`, which documents both
    "text.tokenizer": {"_add_special_token", "_set_proto_tf"},
    "kernels.embedding.quantized": {"_embeddings", "_int4_block_size"},
    "layers.embedding": {"_embeddings"},
    "training.optimizers": {
        "_get_variable_index",
        "_iterations",
        "_learning_rate",
        "_model_variables_moving_average",
        "_momentums",
        "_should_use_adamw",
        "_trainable_variables",
        "_use_weight_decay",
        "_velocities",
    },
    "training.batches.sources": {"_num_epochs"},
    "data.pipelines.streams": {"_parent"},
    "inference.programs.recorded_torch": {"_schema", "_to_copy"},
}


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


def test_backends_are_named_in_their_homes_alone():
    for path, name in modules().items():
        if name.startswith(HOMES):
            continue
        assert "config.backend()" not in path.read_text(encoding="utf-8"), name
        assert {"jax", "tensorflow", "torch"}.isdisjoint(imported.partition(".")[0] for imported in imports(path)), name


def test_private_attributes_of_other_packages_are_listed():
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in modules().items()}
    own = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    listed = set().union(*PRIVATE_OF_OTHERS.values())
    for name, tree in trees.items():
        if name == "_keras_internals":
            continue
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        private = {
            attr for attr in used if attr.startswith("_") and not attr.startswith("__") and attr not in own - listed
        }
        allowed = set().union(*(names for place, names in PRIVATE_OF_OTHERS.items() if name.startswith(place)))
        assert private <= allowed, f"{name} uses {sorted(private - allowed)}"


def test_each_folder_lists_its_modules():
    for folder in sorted({path.parent for path in modules()} - {PACKAGE}):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        listed = {line.split()[0].rstrip("/,") for line in text.splitlines()[1:] if line.strip()}
        listed |= {line.split()[1] for line in text.splitlines()[1:] if ", " in line[:20]}
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        folders = {path.parent.name for path in folder.glob("*/__init__.py")}
        assert files | folders <= listed, f"{folder}: {sorted((files | folders) - listed)}"
        assert len(files | folders) <= 16, f"{folder} has {len(files | folders)} entries"


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
