"""Registers this package's classes with Keras, although `import keras_t5gemma` imports neither them nor Keras.

`keras.models.load_model` and `keras_hub.models.Seq2SeqLM.from_preset` know a class only after its module has been
imported, and they import no modules of other packages. Importing these modules at once would cost seconds, also for the
command line's help and for worker processes that only read text. So they are imported as soon as Keras is: at once if
Keras is imported already, else after the outermost import that imports Keras, so that no module is used before it is
complete.
"""

import importlib
import importlib.abc
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
# The modules with a class that `keras.saving.register_keras_serializable` decorates.
REGISTERING = (
    "heads.text_classifier",
    "heads.text_inputs",
    "heads.token_classifier",
    "heads.word_inputs",
    "heads.text_embedder",
    "inference.samplers.beam",
    "inference.samplers.top_k_top_p",
    "models.backbone",
    "models.encoder",
    "models.seq2seq_lm",
    "inference.buckets",
    "text.preprocessor",
    "text.tokenizer",
    "training.optimizers.adafactor",
    "training.optimizers.adamw",
    "training.losses.distillation",
    "training.losses.in_batch_negatives",
    "training.losses.preference",
    "training.optimizers.learning_rates",
    "training.losses.cross_entropy",
    "training.optimizers.muon",
)


def register_with_keras() -> None:
    """Imports the modules of `REGISTERING`: now if Keras is imported already, else right after Keras."""
    if "keras" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    for module in REGISTERING:
        importlib.import_module(f"{PACKAGE}.{module}")


class _Finder(importlib.abc.MetaPathFinder):
    """Delegates to the other finders, and counts the open imports per thread. The last one to end registers."""

    def __init__(self):
        self._state = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of Keras, keras-hub or a module of this package, with a loader that counts; None for others."""
        if fullname not in ("keras", "keras_hub") and not fullname.startswith(PACKAGE + "."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def begin(self) -> None:
        """Counts an import that begins, perhaps inside another one."""
        self._state.depth = getattr(self._state, "depth", 0) + 1

    def end(self, succeeded: bool) -> None:
        """Counts an import that has ended. A failed one registers nothing, so that its own error is the only one."""
        self._state.depth -= 1
        if succeeded and self._state.depth == 0 and "keras" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()


class _Loader(importlib.abc.Loader):
    """Wraps a loader, and tells a `_Finder` when loading begins and ends. The module keeps the wrapped loader."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder):
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Creates the module with the wrapped loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module with the wrapped loader, and counts the import."""
        spec = module.__spec__
        assert spec is not None  # the import system has found the module by a spec
        spec.loader = module.__loader__ = self._loader
        self._finder.begin()
        succeeded = False
        try:
            self._loader.exec_module(module)
            succeeded = True
        finally:
            self._finder.end(succeeded)
