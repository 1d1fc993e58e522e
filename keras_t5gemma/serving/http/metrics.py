"""Numbers for Prometheus, in its text format (version 0.0.4). Only the event loop changes them."""

import bisect
from collections.abc import Iterable, Iterator

PREFIX = "keras_t5gemma"
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds, from a step of a small model on an accelerator to a long answer of a large one on a CPU.
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Counter:
    """A number that only grows, per combination of labels.

    Args:
        name: of the metric, without the prefix.
        about: what it counts.
        labels: names of the labels.
    """

    def __init__(self, name: str, about: str, labels: tuple[str, ...] = ()):
        self._name, self._about, self._labels = f"{PREFIX}_{name}", about, labels
        self._counts: dict[tuple[str, ...], int] = {} if labels else {(): 0}

    def add(self, count: int, *values: str) -> None:
        """Adds to the count of these values of the labels. The values come from fixed lists, never from clients."""
        self._counts[values] = self._counts.get(values, 0) + count

    def lines(self) -> Iterator[str]:
        """The metric as text."""
        yield from _head(self._name, self._about, "counter")
        for values, count in sorted(self._counts.items()):
            labels = ",".join(f'{name}="{value}"' for name, value in zip(self._labels, values, strict=True))
            yield f"{self._name}{{{labels}}} {count}" if labels else f"{self._name} {count}"


class Histogram:
    """How often numbers were at most so large.

    Args:
        name: of the metric, without the prefix.
        about: what it measures.
    """

    def __init__(self, name: str, about: str):
        self._name, self._about = f"{PREFIX}_{name}", about
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Adds a number."""
        self._counts[bisect.bisect_left(_BOUNDS, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        """The metric as text."""
        yield from _head(self._name, self._about, "histogram")
        total = 0
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{self._name}_bucket{{le="{bound}"}} {total}'
        yield f"{self._name}_sum {self._sum:.6f}"
        yield f"{self._name}_count {total}"


class Metrics:
    """The metrics of a server."""

    def __init__(self):
        self.requests = Counter("requests_total", "HTTP requests by endpoint and status.", ("endpoint", "status"))
        self.prompt_tokens = Counter("prompt_tokens_total", "Tokens of prompts and of embedded texts.")
        self.generated_tokens = Counter("generated_tokens_total", "Tokens of complete answers.")
        self.first_token = Histogram("first_token_seconds", "Seconds until the first text of a request.")
        self.answer = Histogram("answer_seconds", "Seconds until all answers of a request.")

    def text(self, gauges: Iterable[tuple[str, str, float]]) -> str:
        """All metrics as text.

        Args:
            gauges: `(name, about, value)` of numbers that grow and shrink.
        """
        lines = []
        for metric in vars(self).values():
            lines += metric.lines()
        for name, about, value in gauges:
            lines += [*_head(f"{PREFIX}_{name}", about, "gauge"), f"{PREFIX}_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
