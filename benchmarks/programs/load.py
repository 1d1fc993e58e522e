"""Loads a folder in bfloat16, by this package or by keras-hub: `load.py ours|theirs FOLDER`.

Prints `[seconds, peak MiB above the import, MiB held at the end]`. Each weight is touched.
"""

import json
import sys
import time

import keras_hub
from keras import ops
from process_memory import forget_peak, in_bytes

which, folder = sys.argv[1:]
if which == "ours":
    import keras_t5gemma as kt

    cls = kt.T5GemmaBackbone
else:
    cls = keras_hub.models.T5GemmaBackbone
ops.convert_to_numpy(ops.matmul(ops.ones((64, 64)), ops.ones((64, 64))))
forget_peak()
before, start = in_bytes("VmRSS"), time.perf_counter()
model = cls.from_preset(folder, dtype="bfloat16")
for weight in model.weights:
    ops.convert_to_numpy(ops.sum(ops.cast(weight[:1], "float32")))
seconds = time.perf_counter() - start
print(json.dumps([seconds, (in_bytes("VmHWM") - before) / 2**20, (in_bytes("VmRSS") - before) / 2**20]))
