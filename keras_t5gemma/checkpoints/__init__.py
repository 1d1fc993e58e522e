"""Files to tensors to variables and back. One table of tensors serves load, export and adapt.

hugging_face/   safetensors, configs, tokenizers, PEFT
keras_formats/  Keras presets and models
orbax/          Flax's checkpoints
adapt           Gemma 2's tensors as T5Gemma's: the adaptation of arXiv 2504.06225, one tensor at a time
atomic_folder   A folder that appears under its name only once it is complete
checks          Checks that a source's tensors are those of its config, without reading any numbers
convert         Files to files: adapt, average and convert checkpoints of any size
load            Tensors into a model's variables, strictly both ways
processes       Multi-process helpers (JAX): rank, agreement between processes, and gathering of sharded tensors
sources         Where weights come from: a folder, a hub, a preset or a model in memory
tensor_source   `TensorSource`, the interface of every checkpoint: named tensors that are read one at a time
tensor_table    The one table of T5Gemma's tensors, one row per kind
to_device       Arrays to tensors on the backend's device, without a copy if that is the CPU
transforms      Sources made of other sources, tensor by tensor: in another dtype, or as the mean of several
verify          Checks that read a checkpoint's numbers: its checksums, and comparisons with another checkpoint
"""
