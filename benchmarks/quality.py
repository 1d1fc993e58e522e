"""Quantized weights: held-out perplexity and answers compared with float32, and their memory.

    python benchmarks/quality.py FOLDER                        # perplexity and answers, on every backend
    python benchmarks/quality.py FOLDER --memory               # bytes and milliseconds per token, at Small-Small size
    python benchmarks/quality.py FOLDER --backends jax --weights float32 int8

FOLDER stores the models, which are created once. Quality is measured on the demo's toy, as in claims.py: a Gemma 2
pretrained on the documentation of Python's standard library and adapted with PrefixLM. The loss is that of held-out
documents per target token, in nats. Answers are greedy, to held-out prompts. "As float32" is the share of an answer
before the first token that differs from float32's answer on the same backend.

`--memory` uses random weights and a vocabulary of 256,000, saved in bfloat16. "Promised" is the size of the quantized
weights, scales and norms. "Loaded" is the additional memory of the process after loading the model. "Load peak" is its
peak while loading. "Generate peak" is its peak while generating from a prompt of 64 tokens afterwards.

Each row runs in its own process. "int8" loads in float32 and then quantizes. "int8_from_float32" is `from_preset`'s
dtype of that name. "int4" is Keras's default: a scale and a zero for each 128 inputs of an output. "Tables" are the
embeddings; the decoder's table is also the output projection.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import record

# By name: the dtype that is loaded, and how it is quantized then, matrices and tables: a mode, and int4's block size.
WEIGHTS = {
    "float32": ("float32", None, None),
    "bfloat16": ("bfloat16", None, None),
    "int8": ("float32", ("int8", None), ("int8", None)),
    "int8_from_float32": ("int8_from_float32", None, None),
    "int8_from_bfloat16": ("int8_from_bfloat16", None, None),
    "int4": ("float32", ("int4", None), ("int4", None)),
    "int4_from_float32": ("int4_from_float32", None, None),
    "int4_from_bfloat16": ("int4_from_bfloat16", None, None),
    "int4, a scale a channel": ("float32", ("int4", -1), ("int4", -1)),
    "int4, blocks of 32": ("float32", ("int4", 32), ("int4", 32)),
    "int4, tables int8": ("float32", ("int4", None), ("int8", None)),
    "int4, blocks of 32, tables int8": ("float32", ("int4", 32), ("int8", None)),
}
PROMPTS, ANSWER = 32, 32


def train(folder, pretraining_steps, steps):
    """Saves the toy model of the quality measurements as a Keras preset with its tokenizer, if it is missing."""
    if (folder / "toy").is_dir():
        return
    import keras
    from rich.console import Console

    import keras_t5gemma as kt
    from keras_t5gemma.demo.corpus import standard_library_corpus
    from keras_t5gemma.demo.fitting import optimizer
    from keras_t5gemma.demo.pretraining import pretrain_gemma2, save_gemma2
    from keras_t5gemma.demo.settings import FULL
    from keras_t5gemma.training.callbacks.progress_bar import ProgressBar, progress_display

    keras.utils.set_random_seed(0)
    corpus = standard_library_corpus()
    proto = kt.train_tokenizer(corpus.train, FULL.vocabulary_size, folder / "tokenizer.model")
    pretraining = dataclasses.replace(FULL.large_pretraining, steps=pretraining_steps)
    adaptation = dataclasses.replace(FULL.adaptation, steps=steps)
    with progress_display(Console()) as display:
        bar = ProgressBar(display, "pretrain a Gemma 2", pretraining.steps)
        gemma2, _ = pretrain_gemma2(FULL.large, corpus, proto, FULL, pretraining, [bar])
        save_gemma2(gemma2, proto, folder / "gemma2")
        lm = kt.T5GemmaSeq2SeqLM(kt.adapt_gemma2(str(folder / "gemma2")))
        lm.compile(optimizer=optimizer(adaptation))
        data = kt.pretraining_dataset(
            corpus.train,
            kt.T5GemmaTokenizer(proto=proto),
            kt.PrefixLM(FULL.encoder_length, FULL.decoder_length),
            batch_size=adaptation.batch_size,
            seed=0,
        )
        bar = ProgressBar(display, "train a T5Gemma", adaptation.steps)
        lm.fit(data, steps_per_epoch=adaptation.steps, verbose=0, callbacks=[bar])
    lm.backbone.save_to_preset(str(folder / "toy"))


def draw(folder):
    """Saves random weights of Small-Small size, if they are missing."""
    if (folder / "s_s").is_dir():
        return
    import keras_t5gemma as kt

    kt.export_to_hugging_face(kt.T5GemmaBackbone("s", "s", dtype="bfloat16"), folder / "s_s")


def load(preset, name):
    """The model of a preset, with weights in the named form."""
    import keras

    import keras_t5gemma as kt

    dtype, matrices, tables = WEIGHTS[name]
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(preset), dtype=dtype, preprocessor=None)
    for kind, chosen in ((keras.layers.Dense, matrices), (keras.layers.Embedding, tables)):
        if chosen is not None:
            mode, block = chosen
            config = None if block is None else keras.quantizers.Int4QuantizationConfig(block_size=block)
            lm.quantize(mode, config=config, filters=lambda layer, kind=kind: isinstance(layer, kind))
    return lm


def held_out(folder):
    """Batches of held-out examples, and an array of prompts [N, S]."""
    import numpy as np

    import keras_t5gemma as kt
    from keras_t5gemma.demo.corpus import standard_library_corpus
    from keras_t5gemma.demo.settings import FULL

    tokenizer = kt.T5GemmaTokenizer(proto=str(folder / "tokenizer.model"))
    objective = kt.PrefixLM(FULL.encoder_length, FULL.decoder_length)
    texts = standard_library_corpus().held_out
    batches = kt.pretraining_dataset(texts, tokenizer, objective, batch_size=8, shuffle=False, num_epochs=1)
    batches = batches[: FULL.evaluation_batches]
    rows = np.concatenate([x["encoder_token_ids"] for x, *_ in batches])
    return batches, rows[:: len(rows) // PROMPTS][:PROMPTS]


def answers(lm, prompts):
    """Greedy answers to prompts [N, S]: [N, ANSWER]."""
    out = lm.generate({"encoder_token_ids": prompts}, max_new_tokens=ANSWER, stop_token_ids=None)
    return out["decoder_token_ids"][:, 1:]


def measure_quality(folder, name):
    """`{"loss", "agreement", "bytes"}` of the toy."""
    from keras_t5gemma.training.evaluation import mean_loss

    batches, prompts = held_out(folder)
    reference = answers(load(folder / "toy", "float32"), prompts)
    lm = load(folder / "toy", name)
    lm.compile(sampler="greedy")
    same = (answers(lm, prompts) == reference).cumprod(axis=1)
    return {"loss": mean_loss(lm, batches), "agreement": float(same.mean()), "bytes": nbytes(lm.backbone)}


def nbytes(backbone):
    """Bytes of all weights in memory."""
    import keras

    sizes = {"float32": 4, "int32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}
    return sum(math.prod(v.shape) * sizes[keras.backend.standardize_dtype(v.dtype)] for v in backbone.weights)


def memory(field):
    """A field of the process's status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(folder, name):
    """`{"promised", "loaded", "load_peak", "generate_peak", "ms"}` of Small-Small; bytes above the bare import."""
    import keras
    import numpy as np

    import keras_t5gemma as kt

    kt.T5GemmaSeq2SeqLM  # noqa: B018 imported now, not while it is measured
    keras.ops.convert_to_numpy(keras.ops.matmul(keras.ops.ones((64, 64)), keras.ops.ones((64, 64))))
    forget_peak()
    before = memory("VmRSS")
    lm = load(folder / "s_s", name)
    lm.compile(sampler="greedy")
    gc.collect()
    loaded, load_peak = memory("VmRSS") - before, memory("VmHWM") - before
    forget_peak()
    prompt = {"encoder_token_ids": np.random.default_rng(0).integers(3, 256_000, (1, 64), dtype="int32")}
    times = []
    for length in (4, 4, 4, 20, 20, 20):
        start = time.perf_counter()
        lm.generate(prompt, max_new_tokens=length, stop_token_ids=None)
        times.append(time.perf_counter() - start)
    return {
        "promised": nbytes(lm.backbone),
        "loaded": loaded,
        "load_peak": load_peak,
        "generate_peak": memory("VmHWM") - before,
        "ms": 1e3 * (min(times[4:]) - min(times[1:3])) / 16,
    }


def run(backend, name, arguments):
    """A row's measurements, from its own process; None if it failed."""
    command = [sys.executable, __file__, str(arguments.folder), "--only", name, *["--memory"] * arguments.memory]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if result.returncode:
        print(result.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def quality_row(result, reference):
    difference = result["loss"] - reference["loss"]
    return (
        f"{result['loss']:.4f}",
        f"{math.exp(result['loss']):.1f}",
        f"{math.exp(difference) - 1:+.2%}",
        f"{result['agreement']:.0%}",
        f"{result['bytes'] / 1e6:.2f}",
        f"{result['bytes'] / reference['bytes']:.2f}",
    )


def memory_row(result, reference):
    megabytes = [f"{result[key] / 1e6:,.0f}" for key in ("promised", "loaded", "load_peak", "generate_peak")]
    return (*megabytes, f"{result['ms']:.1f}", f"{result['ms'] / reference['ms']:.2f}")


def recorded(arguments, backend, name, result, reference):
    """A row for results/."""
    if arguments.memory:
        megabytes = {f"{key}_mb": result[key] / 1e6 for key in ("promised", "loaded", "load_peak", "generate_peak")}
        common = {"topic": "Memory of quantized weights", "backend": backend, "model": "s_s"}
        return {**common, "vocabulary_size": 256_000, "weights": name, **megabytes, "token_ms": result["ms"]}
    return {
        "topic": "Quantized",
        "backend": backend,
        "weights": name,
        "loss_nats": result["loss"],
        "perplexity": math.exp(result["loss"]),
        "perplexity_change_percent": 100 * (math.exp(result["loss"] - reference["loss"]) - 1),
        "as_float32_percent": 100 * result["agreement"],
        "weights_mb": result["bytes"] / 1e6,
        "size_to_float32": result["bytes"] / reference["bytes"],
    }


def print_table(arguments):
    from rich.console import Console
    from rich.table import Table

    headings = ("loss", "perplexity", "to float32", "as float32", "MB", "to float32")
    title, row = "Held-out text, by a toy", quality_row
    if arguments.memory:
        headings = ("promised, MB", "loaded, MB", "load peak, MB", "generate peak, MB", "ms a token", "to float32")
        title, row = "Memory above the import, Small-Small", memory_row
    table = Table(title=title)
    for heading in ("backend", "weights", *headings):
        table.add_column(heading, justify="left" if heading in ("backend", "weights") else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        reference = None
        for name in arguments.weights:
            result = run(backend, name, arguments)
            reference = reference or result
            cells = row(result, reference) if result else ("failed",)
            table.add_row(backend, name, *cells)
            if result:
                record.record(arguments, [recorded(arguments, backend, name, result, reference)])
            print(backend, name, *cells, flush=True)
    Console(width=140).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder of the models, which are created if they are missing.")
    parser.add_argument("--memory", action="store_true", help="Measure memory and speed instead of quality.")
    parser.add_argument(
        "--weights",
        nargs="*",
        default=list(WEIGHTS),
        choices=list(WEIGHTS),
        help="Forms of the weights; the first is the reference.",
    )
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--pretraining-steps", type=int, default=1000, help="Training steps of the Gemma 2.")
    parser.add_argument("--steps", type=int, default=300, help="Training steps of the T5Gemma.")
    parser.add_argument("--only", choices=list(WEIGHTS), help=argparse.SUPPRESS)
    record.add_options(parser)
    arguments = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    if arguments.only:
        measure = measure_memory if arguments.memory else measure_quality
        print(json.dumps(measure(arguments.folder, arguments.only)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.memory:
        draw(arguments.folder)
    else:
        train(arguments.folder, arguments.pretraining_steps, arguments.steps)
    print_table(arguments)


if __name__ == "__main__":
    main()
