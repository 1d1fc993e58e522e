"""`warn_caller`: warnings that point to the user's line, however deep inside Keras the package notices the cause."""

from __future__ import annotations

import sys
import threading
import warnings
from types import FrameType

# Packages whose functions run between the user's line and the place that warns.
_INSIDE = set(
    "keras_t5gemma keras keras_hub tensorflow jax torch grain lm_eval contextlib functools concurrent threading queue "
    "weakref".split()
)


def warn_caller(message: str) -> None:
    """Emits a UserWarning for the innermost line on the stack outside this package, Keras and the backends.

    `warnings.warn` has `skip_file_prefixes` for this from Python 3.12 on. The threads of a data pipeline have no such
    line. Their warnings point to the line that the main thread is at, which waits for the data.

    Args:
        message: the text of the warning.
    """
    frame = _outside(sys._getframe(1)) or _outside(sys._current_frames().get(threading.main_thread().ident or 0))
    if frame is None:
        warnings.warn(message, stacklevel=2)
        return
    module = frame.f_globals
    registry = module.setdefault("__warningregistry__", {})
    name = module.get("__name__", "<unknown>")
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, name, registry)


def _outside(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside the packages, from this one on."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame = frame.f_back
    return frame
