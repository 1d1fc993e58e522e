"""Adapting from files to files compared with `cp`, and loading compared with keras-hub: time and peak memory.

    python benchmarks/checkpoints.py adapt --encoder 2b --decoder 2b     # 5 GB in, 11 GB out
    python benchmarks/checkpoints.py adapt --encoder 9b --decoder 2b     # 24 GB in (sparse), 25 GB out
    python benchmarks/checkpoints.py load                                # 625 MB, on every backend installed

Weights are random. Each measured program runs in its own process, all in one run on the same disk.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import own_process
import record
from rich.console import Console
from rich.table import Table

from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config, write_t5gemma_config
from keras_t5gemma.checkpoints.hugging_face.writer import write_json, write_tensors
from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, DTYPES, TensorSource
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.presets import STACKS

VOCABULARY_SIZE = 256_000


class RandomTensors(TensorSource):
    """bfloat16 weights of a config: one block of random numbers over and over, which no file system compresses."""

    def __init__(self, shapes):
        self._shapes = shapes
        block = np.random.default_rng(0).standard_normal(CHUNK_BYTES // 2, dtype="float32") * np.float32(0.02)
        self._block = block.astype(DTYPES["BF16"])

    def names(self):
        return list(self._shapes)

    def shape(self, name):
        return self._shapes[name]

    def dtype(self, name):
        del name
        return DTYPES["BF16"]

    def read(self, name):
        return np.resize(self._block, self._shapes[name])

    def chunks(self, name):
        left = int(np.prod(self._shapes[name]))
        while left > 0:
            yield self._block[:left]
            left -= len(self._block)

    def where(self, name=None):
        return f"random ({name})"


def write_gemma2(folder, size, sparse):
    """A Gemma 2 of random weights, or of a hole as large on disk as its header."""
    config = Gemma2Config(STACKS[size], VOCABULARY_SIZE, 30.0)
    both = write_t5gemma_config(T5GemmaConfig(config.stack, config.stack), "bfloat16")
    shapes = {tensor.gemma2: tensor.stored_shape for tensor in config.tensors()}
    with new_folder(folder) as partial:
        write_json(
            partial / "config.json",
            both["decoder"] | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        )
        if not sparse:
            write_tensors(partial, RandomTensors(shapes))
            return
        header, position = {}, 0
        for name, shape in shapes.items():
            end = position + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        with (partial / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)


def timed(*command):
    """(seconds with everything on disk, peak MB) of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=own_process.environment())
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"{command} failed with {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def size_of(folder):
    return sum(path.stat().st_size for path in Path(folder).iterdir())


def benchmark_adapt(folder, arguments):
    encoder, decoder, repeats = arguments.encoder, arguments.decoder, arguments.repeats
    sources = {}
    for size in (encoder, decoder):
        sources[size] = folder / f"gemma2-{size}"
        if not sources[size].exists():
            write_gemma2(sources[size], size, sparse=size == "9b")
    os.sync()
    table = Table(title=f"Gemma 2 {encoder} and {decoder} into T5Gemma {encoder}-{decoder}, bfloat16")
    for heading in ("run", "GB out", "adapt s", "cp s", "adapt / cp", "adapt peak MB", "largest tensor MB"):
        table.add_column(heading, justify="right")
    out, copy = folder / "out", folder / "copy"
    rows = []
    for run in range(1, repeats + 1):
        for path in (out, copy):
            shutil.rmtree(path, ignore_errors=True)
        os.sync()
        adapt = own_process.command("command_line", "adapt", sources[encoder], sources[decoder], out)
        seconds, peak = timed(*adapt)
        copied, _ = timed("cp", "-r", "--reflink=never", str(out), str(copy))
        largest = max(STACKS[size].hidden_dim for size in (encoder, decoder)) * VOCABULARY_SIZE * 2 / 2**20
        row = (size_of(out) / 1e9, seconds, copied, seconds / copied, peak, largest)
        rows.append(row)
        table.add_row(str(run), *(f"{value:.2f}" for value in row))
    _, seconds, copied, _, peak, largest = map(list, zip(*rows, strict=True))
    row = {
        "topic": "From file to file",
        "backend": None,
        "encoder": encoder,
        "decoder": decoder,
        "dtype": "bfloat16",
        "seconds": seconds,
        "peak_mib": max(peak),
        "largest_tensor_mib": largest[0],
        "peer": [{"program": "cp", "seconds": copied}],
        "aim": [
            {"field": "seconds", "at_most": 1.5, "of": "cp"},
            {"field": "peak_mib", "at_most": round(largest[0] + 1e9 / 2**20), "of": None},
        ],
    }
    record.record(arguments, [row])
    Console(width=120).print(table)


def benchmark_load(folder, arguments):
    repeats = arguments.repeats
    config = T5GemmaConfig(STACKS["s"], STACKS["s"])
    ours, theirs = folder / "t5gemma-s-s", folder / "keras-hub-s-s"
    if not ours.exists():
        with new_folder(ours) as partial:
            write_json(partial / "config.json", write_t5gemma_config(config, "bfloat16"))
            write_tensors(partial, RandomTensors({tensor.name: tensor.stored_shape for tensor in tensor_specs(config)}))
    backends = [name for name in ("jax", "tensorflow", "torch") if importlib.util.find_spec(name)]
    if not theirs.exists():
        own_process.run(backends[0], "save_keras_hub_preset", theirs, check=True)
    weights = size_of(ours) / 2**20
    table = Table(title=f"Loading Small-Small in bfloat16, {weights:.0f} MB of weights; medians of {repeats}")
    for heading in ("backend", "program", "from", "seconds", "to keras-hub", "peak MB above import", "peak / weights"):
        table.add_column(heading, justify="right" if heading not in ("backend", "program", "from") else "left")
    for backend in backends:
        runs = {}
        for _ in range(repeats):
            for program, which, source in (
                ("keras-hub", "theirs", theirs),
                ("keras-t5gemma", "ours", ours),
                ("keras-t5gemma", "ours", theirs),
            ):
                result = own_process.run(backend, "load", which, source, check=True)
                runs.setdefault((program, source.name), []).append(json.loads(result.stdout.splitlines()[-1]))
        medians = {key: np.median(values, axis=0) for key, values in runs.items()}
        reference = medians["keras-hub", theirs.name][0]
        for (program, source), (seconds, peak, _) in medians.items():
            form = "safetensors" if source == ours.name else "h5"
            row = (f"{seconds:.2f}", f"{seconds / reference:.2f}", f"{peak:.0f}", f"{peak / weights:.2f}")
            table.add_row(backend, program, form, *row)
        record.record(arguments, loading_rows(backend, runs, theirs.name, weights))
    Console(width=120).print(table)


def loading_rows(backend, runs, theirs, weights):
    """Rows of the runs `{(program, folder): [(seconds, peak, rest)]}` on a backend."""
    numbers = {}
    for (program, source), values in runs.items():
        seconds, peaks, _ = map(list, zip(*values, strict=True))
        peak = float(np.median(peaks))
        numbers[program, "h5" if source == theirs else "safetensors"] = {
            "seconds": seconds,
            "peak_mib": peak,
            "peak_to_weights": peak / weights,
        }
    peer = {"program": "keras-hub", "format": "h5", **numbers.pop(("keras-hub", "h5"))}
    aims = [
        {"field": "seconds", "at_most": 0.5, "of": "keras-hub"},
        {"field": "peak_to_weights", "at_most": 1.3, "of": None},
    ]
    common = {"topic": "Loading", "backend": backend, "model": "s_s", "dtype": "bfloat16", "weights_mib": weights}
    return [{**common, "format": form, **row, "peer": [peer], "aim": aims} for (_, form), row in numbers.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["adapt", "load"])
    parser.add_argument(
        "--folder", type=Path, help="Folder to write to; by default a temporary folder that is removed at the end."
    )
    parser.add_argument("--encoder", default="2b", choices=STACKS)
    parser.add_argument("--decoder", default="2b", choices=STACKS)
    parser.add_argument("--repeats", type=int, default=3)
    record.add_options(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.what == "load":
            benchmark_load(folder, arguments)
        else:
            benchmark_adapt(folder, arguments)


if __name__ == "__main__":
    main()
