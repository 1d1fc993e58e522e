"""A decoding step on PyTorch, recorded as tensor operations and replayed without the Python of its layers.

Of a step of Small-Small on a CPU, half is Keras calling layers; on a GPU, nearly all is waiting for Python. A recording
does what the layers did, operation by operation, so that its numbers are the same:

    on a CPU                         recorded once a shape has come up `_STEPS_BEFORE` times: recording takes as long
    on a GPU                         recorded at once, and as a CUDA graph, which has no Python left at all
    compile(jit_compile=True)        compiled by `torch.compile` besides, which fuses operations and takes a minute
    run_eagerly=True                 never

Other backends compile the whole loop, and a step goes through here untouched.
"""

import threading
import weakref

import keras

# Steps of one shape on a CPU that cost as much without a recording as making it: 1.6 s beside 20 ms a step.
_STEPS_BEFORE = 64
# Recordings that are kept: each belongs to one shape, and on a GPU holds a cache of that shape.
_MOST_RECORDINGS = 4
# Shapes that are counted: a server that never sees one again remembers no more of them.
_MOST_COUNTS = 256


def recorded(step, model):
    """`step`, or on PyTorch a `RecordedStep` of it.

    Args:
        step: `(ids [B, T], cache, index) -> (logits [B, T, V], hidden states [B, T, D], cache)`.
        model: the `keras.Model` whose variables it reads.
    """
    return RecordedStep(step, model) if keras.config.backend() == "torch" else step


class RecordedStep:
    """See the module. Prompts, and steps that gradients are wanted of, run as they are.

    A decoding run that goes on keeps to its recording: LoRA and quantizing count from the next run on. Threads that
    decode at once take turns, step by step: a recording is made of what all of PyTorch does meanwhile, and a CUDA graph
    reads and writes the same tensors each time.

    Args:
        step: as for `recorded`.
        model: likewise; its `run_eagerly` and `jit_compile` say how to run.
    """

    def __init__(self, step, model):
        self._step = step
        self._model = model
        self._counts = {}
        self._recordings = {}
        self._lock = threading.Lock()
        self._last = threading.local()

    def __call__(self, token_ids, cache, index):
        """What `step` gives; the cache is overwritten."""
        import torch

        if token_ids.shape[1] != 1 or torch.is_grad_enabled() or self._model.run_eagerly:
            return self._step(token_ids, cache, index)
        with self._lock:
            return self._run(token_ids, cache, index)

    def _run(self, token_ids, cache, index):
        leaves = keras.tree.flatten(cache)
        if not self._goes_on(leaves):
            self._last.key = self._key(token_ids, leaves)
        key = self._last.key
        if key not in self._recordings:
            if len(self._counts) == _MOST_COUNTS:
                self._counts.clear()
            self._counts[key] = self._counts.get(key, 0) + 1
            if not token_ids.is_cuda and not self._model.jit_compile and self._counts[key] <= _STEPS_BEFORE:
                return self._step(token_ids, cache, index)
            self._make_room()
            self._recordings[key] = _Recording(self._step, token_ids, cache, index, self._model.jit_compile)
        logits, hidden, *leaves = self._recordings[key](token_ids, leaves, index)
        self._last.leaves = [weakref.ref(x) for x in leaves]
        return logits, hidden, keras.tree.pack_sequence_as(cache, leaves)

    def _goes_on(self, leaves):
        """Whether the cache is what the last step gave: its key holds, and to ask all variables takes milliseconds."""
        last = getattr(self._last, "leaves", [])
        return len(last) == len(leaves) and all(given() is x for given, x in zip(last, leaves, strict=True))

    def _key(self, token_ids, leaves):
        """What a recording depends on: shapes, and the tensors of the weights, which LoRA and quantizing exchange."""
        shapes = [(x.shape, x.stride(), x.dtype, x.device) for x in (token_ids, *leaves)]
        return *shapes, *(id(variable.value) for variable in self._model.variables)

    def _make_room(self):
        if len(self._recordings) == _MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        self._counts.clear()


class _Recording:
    """A step of one shape.

    Args:
        step: the function that is recorded.
        token_ids: int [B, 1].
        cache: nested structure of tensors.
        index: an int or a scalar tensor.
        jit_compile: whether `torch.compile` is to make the recorded operations faster.
    """

    def __init__(self, step, token_ids, cache, index, jit_compile):
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        def flat(token_ids, index, *leaves):
            logits, hidden, new = step(token_ids, keras.tree.pack_sequence_as(cache, list(leaves)), index)
            return logits, hidden, *keras.tree.flatten(new)

        # On copies: recording runs the step, and writes.
        inputs = [token_ids, _place(index, token_ids), *(x.clone() for x in keras.tree.flatten(cache))]
        self._run = _with_constants(make_fx(flat)(*inputs))
        if jit_compile:
            self._run = torch.compile(self._run, dynamic=False, fullgraph=True)
        self._graphs = []

    def __call__(self, token_ids, leaves, index):
        """`(logits, hidden states, *leaves)`."""
        index = _place(index, token_ids)
        if not token_ids.is_cuda:
            return self._run(token_ids, index, *leaves)
        graph = next((graph for graph in self._graphs if graph.may_take(leaves)), None)
        if graph is None:
            graph = _Graph(self._run, token_ids, index, leaves)
            self._graphs.append(graph)
        return graph(token_ids, index, leaves)


class _Graph:
    """A CUDA graph, which reads and writes tensors of its own.

    Whoever decodes gets its cache, and brings it again for the next step, so that nothing is copied. Two that decode in
    turn, such as two streams, have a graph each: it is lent as long as the tensors it gave are held somewhere.
    """

    def __init__(self, run, token_ids, index, leaves):
        import torch

        self._inputs = [x.clone() for x in (token_ids, index, *leaves)]
        self._lent = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is compiled or chosen at first use must not be part of the graph
                run(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others may allocate meanwhile
            logits, hidden, *new = run(*self._inputs)
            for old, x in zip(self._inputs[2:], new, strict=True):
                if x.data_ptr() != old.data_ptr():
                    old.copy_(x)
        self._results = logits, hidden

    def may_take(self, leaves):
        """Whether these are its own tensors, or nobody holds those any more."""
        return self._holds(leaves) or not any(reference() is not None for reference in self._lent)

    def _holds(self, leaves):
        return all(x.data_ptr() == own.data_ptr() for x, own in zip(leaves, self._inputs[2:], strict=True))

    def __call__(self, token_ids, index, leaves):
        """`(logits, hidden states, *leaves)`."""
        for own, x in zip(self._inputs, (token_ids, index, *leaves), strict=True):
            if own.data_ptr() != x.data_ptr():
                own.copy_(x)
        self._graph.replay()
        lent = [own.view_as(own) for own in self._inputs[2:]]
        self._lent = [weakref.ref(x) for x in lent]
        return *(x.clone() for x in self._results), *lent


def _with_constants(module):
    """A recording whose constants are ready: those of Python's would be copied to the device in each step anew."""
    import torch

    copies = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten._to_copy.default)
    values = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(module, node.target)
            if not isinstance(tensor, torch.nn.Parameter):  # of a variable, which may be assigned to
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


def _place(index, token_ids):
    """The index as a tensor beside the ids: a number would be recorded as it is."""
    import torch

    return torch.as_tensor(index, dtype=torch.int32, device=token_ids.device)
