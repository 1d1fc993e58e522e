"""Keras finds this package's classes in files, though `import keras_t5gemma` imports neither them nor Keras.

`keras.models.load_model` and `keras_hub.models.Seq2SeqLM.from_preset` know a class once its module has been imported,
and import no other package's modules by themselves. Importing them here would cost seconds, for the command line's help
and for worker processes that only read text, too. So they are imported as soon as Keras is: at once if it is there
already, else when the outermost import that brings it in has ended, so that no module is needed before it is complete.
"""

import importlib
import importlib.abc
import sys
import threading

PACKAGE = __name__.rpartition(".")[0]
# The modules that have a class with `keras.saving.register_keras_serializable`.
REGISTERING = (
    "inference.samplers.beam",
    "inference.samplers.top_k_top_p",
    "models.backbone",
    "models.seq2seq_lm",
    "inference.buckets",
    "text.preprocessor",
    "text.tokenizer",
    "training.optimizers.adafactor",
    "training.optimizers.adamw",
    "training.losses.distillation",
    "training.optimizers.learning_rates",
    "training.losses.cross_entropy",
    "training.optimizers.muon",
)


def register_with_keras():
    """Imports the modules above if Keras is imported, or has them imported after Keras."""
    if "keras" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register():
    for module in REGISTERING:
        importlib.import_module(f"{PACKAGE}.{module}")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what others find, and counts imports that have begun and not ended; the last to end registers."""

    def __init__(self):
        self._state = threading.local()

    def find_spec(self, fullname, path, target=None):
        """The spec of Keras, keras-hub or a module of this package, with a loader that counts."""
        if fullname not in ("keras", "keras_hub") and not fullname.startswith(PACKAGE + "."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def begin(self):
        """An import begins, perhaps within another."""
        self._state.depth = getattr(self._state, "depth", 0) + 1

    def end(self, succeeded):
        """An import has ended; one that failed registers nothing, so that its own error is the only one."""
        self._state.depth -= 1
        if succeeded and self._state.depth == 0 and "keras" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()


class _Loader(importlib.abc.Loader):
    """Another loader, which tells a `_Finder` when it begins and ends, and leaves the module to the other."""

    def __init__(self, loader, finder):
        self._loader = loader
        self._finder = finder

    def create_module(self, spec):
        """As the other loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module):
        """As the other loader, counted."""
        module.__spec__.loader = module.__loader__ = self._loader
        self._finder.begin()
        succeeded = False
        try:
            self._loader.exec_module(module)
            succeeded = True
        finally:
            self._finder.end(succeeded)
