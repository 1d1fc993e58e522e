"""A training step of Small-Small size beside keras-hub's T5Gemma and `transformers`: seconds and peak memory.

    python benchmarks/train.py                                  # every backend, batch 2 x 128 + 128
    python benchmarks/train.py --batch 4 --length 512           # 4 x 512 + 512
    python benchmarks/train.py --dtype mixed_bfloat16

Vocabulary 256,000, random weights and ids, all of a batch's tokens in use; AdamW, keras-hub with Keras's, this package
with its own, which `kt.optimizer("adamw")` is, transformers with PyTorch's. Each program runs in a process of its
own; seconds are the median of the steps after those to warm up, memory is the peak above the bare import in GB of
1e9 bytes. To take a long table in pieces, name a program with `--programs`; ratios are to the first that is named.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

from rich.console import Console
from rich.table import Table

MEASURE = """
import json, sys, time
import numpy as np
program, batch, length, dtype, steps, warm_up = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], *map(
    int, sys.argv[5:7])
V = 256000
rng = np.random.default_rng(0)
ids = {side: rng.integers(3, V, (batch, length), dtype="int32") for side in ("encoder", "decoder", "label")}
def memory(field):
    return next(int(line.split()[1]) * 1024 / 1e9 for line in open("/proc/self/status") if line.startswith(field))
if program == "transformers":
    import torch, transformers
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    stack = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, query_pre_attn_scalar=64, vocab_size=V, attention_dropout=0.0)
    config = transformers.T5GemmaConfig(encoder=transformers.T5GemmaModuleConfig(**stack),
        decoder=transformers.T5GemmaModuleConfig(**stack), vocab_size=V, dropout_rate=0.0, attn_implementation="eager")
    model = transformers.T5GemmaForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tensors = {side: torch.from_numpy(value).long() for side, value in ids.items()}
    def step():
        out = model(input_ids=tensors["encoder"], decoder_input_ids=tensors["decoder"], labels=tensors["label"])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        return float(out.loss)
else:
    import keras, keras_hub
    if program == "keras-t5gemma":
        import keras_t5gemma as kt
        kt.T5GemmaSeq2SeqLM
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    if program == "keras-t5gemma":
        model = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone("s", "s", dtype=dtype))
    else:
        sizes = dict(hidden_dim=512, intermediate_dim=1024, num_layers=8, num_attention_heads=8, num_key_value_heads=8,
            head_dim=64, layer_types=["sliding_attention", "full_attention"] * 4)
        both = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in sizes.items()}
        backbone = keras_hub.models.T5GemmaBackbone(vocabulary_size=V, query_pre_attn_scalar=64, sliding_window=4096,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, cross_attention_hidden_size=512, dtype=dtype,
            **both)
        model = keras_hub.models.T5GemmaSeq2SeqLM(backbone=backbone, preprocessor=None)
    # keras-hub's "auto" brings another optimizer: AdamW for both, each with its default loss and accuracy.
    if program == "keras-t5gemma":
        from keras_t5gemma.training.optimizers.adamw import AdamW
    else:
        AdamW = keras.optimizers.AdamW
    model.compile(optimizer=AdamW(1e-4))
    ones = np.ones((batch, length), "int32")
    x = dict(encoder_token_ids=ids["encoder"], encoder_padding_mask=ones, decoder_token_ids=ids["decoder"],
        decoder_padding_mask=ones)
    def step():
        logs = model.train_on_batch(x, ids["label"], ones.astype("float32"), return_dict=True)
        return float(logs["loss"])
times = []
for _ in range(steps + warm_up):
    start = time.perf_counter()
    loss = step()
    times.append(time.perf_counter() - start)
print(json.dumps([float(np.median(times[warm_up:])), memory("VmHWM") - before, loss, times[0]]))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="Of encoder and decoder each.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=3, help="Measured, after those to warm up.")
    parser.add_argument("--warm-up", type=int, default=2, help="Steps before the measured ones.")
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--programs", nargs="*", default=["keras-hub", "keras-t5gemma", "transformers"])
    arguments = parser.parse_args()
    title = f"Training step, S-S, batch {arguments.batch} x {arguments.length} + {arguments.length}, {arguments.dtype}"
    table = Table(title=title)
    for heading in (
        "backend",
        "program",
        "seconds",
        "ratio",
        "peak GB",
        "ratio",
        "loss",
        "first step, s",
    ):
        table.add_column(heading, justify="left" if heading in ("backend", "program") else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        reference = None
        for program in arguments.programs:
            if program == "transformers" and backend != "torch":
                continue
            command = [sys.executable, "-c", MEASURE, program, arguments.batch, arguments.length, arguments.dtype]
            result = subprocess.run(
                [*map(str, command), str(arguments.steps), str(arguments.warm_up)],
                check=False,
                capture_output=True,
                text=True,
                env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            )
            if result.returncode:
                table.add_row(backend, program, f"failed ({result.returncode})")
                print(result.stderr[-2000:], file=sys.stderr)
                continue
            seconds, peak, loss, first = json.loads(result.stdout.splitlines()[-1])
            reference = reference or (seconds, peak)
            ratios = [f"{value / base:.2f}" for value, base in zip((seconds, peak), reference, strict=True)]
            row = (f"{seconds:.2f}", ratios[0], f"{peak:.2f}", ratios[1], f"{loss:.3f}", f"{first:.1f}")
            table.add_row(backend, program, *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
