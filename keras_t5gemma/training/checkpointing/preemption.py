"""Notices that the machine will be taken away: a SIGTERM, after which a run saves and leaves."""

import itertools
import os
import signal
import sys
import threading
from types import FrameType

import keras
import numpy as np

from keras_t5gemma.checkpoints.processes import gather, process_count

# sysexits.h calls it EX_TEMPFAIL: a failure that trying again helps against.
EXIT_CODE = 75


class Preemption:
    """Listens for SIGTERM while `fit` runs.

    A first signal is noted. A second one acts as it would without this. A handler of the program's own stays, and so
    does that of a thread other than the main one, which Python allows no handlers.

    Several processes agree on a step: on JAX, `jax.distributed` tells each of them of a signal to one; on PyTorch they
    ask each other after each step.
    """

    # Of the program: JAX never forgets a signal, and a later run must not meet the number that was agreed on.
    _steps = itertools.count(1)

    def __init__(self):
        self._noted, self._previous = False, None

    def begin(self) -> None:
        """Begins to listen, if the program does not."""
        self._noted = False
        earlier = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(earlier, Preemption):  # of a `fit` that an exception ended
            earlier.end()
        is_main = threading.current_thread() is threading.main_thread()
        if self._by_jax() or not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def end(self) -> None:
        """Listens no more."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def is_asked(self) -> bool:
        """Whether to save and leave now. All processes call this after each step, and all get True after the same."""
        if self._by_jax():
            from jax.experimental import multihost_utils

            # It answers True for the number that follows the largest so far, so numbers must have no gaps.
            self._noted |= multihost_utils.reached_preemption_sync_point(next(self._steps))
        elif process_count() > 1:
            self._noted = bool(gather(np.array(self._noted)).any())
        return self._noted

    def leave(self, folder, number: int) -> None:
        """Ends the program, after the checkpoint has been written.

        Args:
            folder: the folder of the run.
            number: batches trained on.

        Raises:
            SystemExit: always, with `EXIT_CODE`.
        """
        self.end()
        print(
            f"SIGTERM: the run in {folder} is saved after batch {number}. Start the same program again to resume it.",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(EXIT_CODE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.end()
        if _is_in_fit(frame):
            self._noted = True
        else:  # `fit` ended by an exception, which tells no callback
            os.kill(os.getpid(), number)

    @staticmethod
    def _by_jax() -> bool:
        """Whether JAX has a handler, which tells all processes."""
        if keras.config.backend() != "jax" or process_count() == 1:
            return False
        import jax

        return bool(jax.config.jax_enable_preemption_service)


def _is_in_fit(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "fit":
            return True
        frame = frame.f_back
    return False
