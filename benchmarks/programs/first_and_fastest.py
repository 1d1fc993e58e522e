"""Seconds of a call."""

import time


def first_and_fastest(run, repeats):
    """Seconds of the first call, and of the fastest of so many more."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[0], min(times[1:])
