"""Files to tensors to variables and back. One table of tensors serves load, export and adapt.

hugging_face/   safetensors, configs, tokenizers, PEFT
keras_formats/  Keras presets and models
orbax/          Flax's checkpoints
adapt           Gemma 2's tensors as T5Gemma's: the adaptation of arXiv 2504.06225, one tensor at a time
atomic_folder   A folder that appears under its name only when it is complete
checks          Checks that a source has the tensors of its config
convert         Files to files: adapt, average and convert checkpoints of any size
load            Tensors into a model's variables; every tensor and every variable is accounted for
parts           Parts of a checkpoint under a T5Gemma's names: its encoder alone, its stacks without a head
processes       Multi-process helpers (JAX): rank, agreement between processes, and gathering of sharded tensors
sources         Opens the sources of weights: folders, hubs, presets and models in memory
tensor_source   `TensorSource`, the interface of every checkpoint: named tensors that are read one at a time
tensor_table    The one table of T5Gemma's tensors, one row per kind
to_device       Arrays to tensors on the backend's device, without a copy if the device is the CPU
transforms      Sources computed from other sources, tensor by tensor: casts to another dtype, and means
verify          Checks that read a checkpoint's numbers: checksums, and comparisons with another checkpoint
"""
