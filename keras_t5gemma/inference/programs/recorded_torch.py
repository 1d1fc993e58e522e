"""A decoding step on PyTorch, recorded as tensor operations and replayed without the Python of its layers.

In a step of Small-Small on a CPU, Keras spends half the time calling layers; on a GPU, nearly all the time is spent
waiting for Python. A recording repeats the operations of the layers one by one, so its numbers are the same:

    on a CPU                         recorded once a shape has come up `_STEPS_BEFORE` times: recording takes as long
    on a GPU                         recorded at once, and as a CUDA graph, which runs no Python at all
    compile(jit_compile=True)        also compiled by `torch.compile`, which fuses operations and takes a minute
    run_eagerly=True                 never recorded

Other backends compile the whole loop; there `recorded` returns the step unchanged.
"""

import threading
import weakref
from collections.abc import Callable

import keras

# Recording on a CPU takes as long as this many steps of one shape: 1.6 s at 20 ms per step.
_STEPS_BEFORE = 64
# The number of recordings that are kept: each belongs to one shape, and on a GPU holds a cache of that shape.
_MOST_RECORDINGS = 4
# The number of shapes that are counted, so that a server with ever new shapes uses bounded memory.
_MOST_COUNTS = 256


def recorded(step: Callable, model: keras.Model) -> Callable:
    """`step`, or on PyTorch a `RecordedStep` of it.

    Args:
        step: `(ids [B, T], cache, index) -> (logits [B, T, V], hidden states [B, T, D], cache)`.
        model: the `keras.Model` whose variables the step reads.
    """
    return RecordedStep(step, model) if keras.config.backend() == "torch" else step


class RecordedStep:
    """A decoding step that records itself per shape and replays the recording.

    Prompts (T above 1) and steps under autograd run unrecorded. A decoding run keeps its recording to the end: LoRA and
    quantization take effect with the next run. Threads that decode at the same time take turns, step by step, because a
    recording captures the operations of all threads, and a CUDA graph reads and writes the same tensors each time.

    Args:
        step: as for `recorded`.
        model: as for `recorded`; its `run_eagerly` and `jit_compile` determine how the step runs.
    """

    def __init__(self, step: Callable, model: keras.Model):
        self._step = step
        self._model = model
        self._counts = {}
        self._recordings = {}
        self._lock = threading.Lock()
        self._last = threading.local()

    def __call__(self, token_ids, cache, index):
        """The outputs of `step`; overwrites the cache."""
        import torch

        if token_ids.shape[1] != 1 or torch.is_grad_enabled() or self._model.run_eagerly:
            return self._step(token_ids, cache, index)
        with self._lock:
            return self._run(token_ids, cache, index)

    def _run(self, token_ids, cache, index):
        """Replays the recording for these shapes, or records it once they have come up often enough."""
        leaves = keras.tree.flatten(cache)
        if not self._continues_last_run(leaves):
            self._last.key = self._key(token_ids, leaves)
        key = (*self._last.key, getattr(index, "shape", ()))  # a position per row is another recording
        if key not in self._recordings:
            if len(self._counts) == _MOST_COUNTS:
                self._counts.clear()
            self._counts[key] = self._counts.get(key, 0) + 1
            if not token_ids.is_cuda and not self._model.jit_compile and self._counts[key] <= _STEPS_BEFORE:
                return self._step(token_ids, cache, index)
            self._drop_oldest()
            self._recordings[key] = _Recording(self._step, token_ids, cache, index, self._model.jit_compile)
        logits, hidden, *leaves = self._recordings[key](token_ids, leaves, index)
        self._last.leaves = [weakref.ref(x) for x in leaves]
        return logits, hidden, keras.tree.pack_sequence_as(cache, leaves)

    def _continues_last_run(self, leaves):
        """Whether the cache is the output of the last step, so that its key is still valid.

        It saves computing the key, which visits all variables and takes milliseconds.
        """
        last = getattr(self._last, "leaves", [])
        return len(last) == len(leaves) and all(reference() is x for reference, x in zip(last, leaves, strict=True))

    def _key(self, token_ids, leaves):
        """The key of a recording: shapes, and the tensors of the weights, which LoRA and quantization replace."""
        shapes = [(x.shape, x.stride(), x.dtype, x.device) for x in (token_ids, *leaves)]
        return *shapes, *(id(variable.value) for variable in self._model.variables)

    def _drop_oldest(self) -> None:
        """Drops the oldest recording if there are `_MOST_RECORDINGS`, and restarts the counts."""
        if len(self._recordings) == _MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        self._counts.clear()


class _Recording:
    """The recording of a step for one shape.

    Args:
        step: the function that is recorded.
        token_ids: int [B, 1].
        cache: nested structure of tensors.
        index: an int, a scalar tensor or a tensor [B].
        jit_compile: whether to compile the recorded operations by `torch.compile`.
    """

    def __init__(self, step, token_ids, cache, index, jit_compile):
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        def flat_step(token_ids, index, *leaves):
            logits, hidden, new_cache = step(token_ids, keras.tree.pack_sequence_as(cache, list(leaves)), index)
            return logits, hidden, *keras.tree.flatten(new_cache)

        # On copies: recording runs the step, which writes to the cache.
        inputs = [token_ids, _index_tensor(index, token_ids), *(x.clone() for x in keras.tree.flatten(cache))]
        self._run = _with_device_constants(make_fx(flat_step)(*inputs))
        if jit_compile:
            self._run = torch.compile(self._run, dynamic=False, fullgraph=True)
        self._graphs = []

    def __call__(self, token_ids, leaves, index):
        """Runs the recorded operations; returns `(logits, hidden states, *leaves)`, leaves of the cache."""
        index = _index_tensor(index, token_ids)
        if not token_ids.is_cuda:
            return self._run(token_ids, index, *leaves)
        graph = next((graph for graph in self._graphs if graph.is_available_for(leaves)), None)
        if graph is None:
            graph = _Graph(self._run, token_ids, index, leaves)
            self._graphs.append(graph)
        return graph(token_ids, index, leaves)


class _Graph:
    """A CUDA graph, which reads and writes its own tensors.

    A step returns the graph's own cache, and the caller passes it to the next step, so that nothing is copied. Two runs
    that decode in turn, such as two streams, get one graph each: a graph is in use as long as a caller holds the
    tensors that it returned.

    Args:
        run: the recorded operations, `(token_ids, index, *leaves) -> (logits, hidden states, *leaves)`.
        token_ids: int [B, 1].
        index: int tensor, a scalar or [B].
        leaves: the tensors of the cache.
    """

    def __init__(self, run, token_ids, index, leaves):
        import torch

        self._inputs = [x.clone() for x in (token_ids, index, *leaves)]
        self._returned = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # one-time work of the first runs, such as choosing kernels, must not enter the graph
                run(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others may allocate meanwhile
            logits, hidden, *new_leaves = run(*self._inputs)
            for leaf, x in zip(self._inputs[2:], new_leaves, strict=True):
                if x.data_ptr() != leaf.data_ptr():
                    leaf.copy_(x)
        self._results = logits, hidden

    def is_available_for(self, leaves):
        """Whether the cache is this graph's own, or no caller holds the graph's tensors any more."""
        return self._owns(leaves) or not any(reference() is not None for reference in self._returned)

    def _owns(self, leaves):
        return all(x.data_ptr() == leaf.data_ptr() for x, leaf in zip(leaves, self._inputs[2:], strict=True))

    def __call__(self, token_ids, index, leaves):
        """Copies the inputs if needed, and replays; returns `(logits, hidden states, *leaves)`."""
        for buffer, x in zip(self._inputs, (token_ids, index, *leaves), strict=True):
            if buffer.data_ptr() != x.data_ptr():
                buffer.copy_(x)
        self._graph.replay()
        returned = [leaf.view_as(leaf) for leaf in self._inputs[2:]]
        self._returned = [weakref.ref(x) for x in returned]
        return *(x.clone() for x in self._results), *returned


def _with_device_constants(module):
    """A recording whose constants are buffers on the device; Python constants would be copied there in each step."""
    import torch

    copies = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten._to_copy.default)
    values = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(module, node.target)
            if not isinstance(tensor, torch.nn.Parameter):  # a parameter belongs to a variable, which may change
                values[node] = tensor
        elif node.target in copies and node.args[0] in values:
            written = any(
                getattr(user.target, "_schema", None) and user.target._schema.is_mutable for user in node.users
            )
            if not written:
                values[node] = node.target(values[node.args[0]], *node.args[1:], **node.kwargs)
    for i, (node, value) in enumerate(values.items()):
        if node.op != "get_attr":
            module.register_buffer(f"_ready_{i}", value)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(f"_ready_{i}"))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _index_tensor(index, token_ids):
    """The index as a tensor on the device of the ids; a Python number would be recorded as a constant."""
    import torch

    return torch.as_tensor(index, dtype=torch.int32, device=token_ids.device)
