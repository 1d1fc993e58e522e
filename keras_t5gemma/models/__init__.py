"""The two stacks, the backbone, and the task model that joins training and inference.

adapted        `adapt_gemma2`: a T5Gemma from one Gemma 2 or from two
backbone       The backbone: both stacks as one Keras model from token ids to hidden states
encoder        The encoder without a decoder, for embeddings and classifiers
guarded        Keras's methods of a model, made safe for callbacks and threads
quantization   `quantize`, and dtypes such as "int8_from_bfloat16"
recompilation  Recompiles a model after LoRA, `quantize` or `trainable` changed it
saved_state    The part of a backbone's config beside its architecture: quantization, LoRA, and frozen weights
seq2seq_lm     The task model: logits for training, text for a prompt
sharding       Layouts for `keras.distribution`: which device holds which part of a weight or activation
stack_model    What the backbone and the encoder alone have in common: LoRA, quantization, saving and loading
stacks         The two stacks: the package's only forward pass, for training, prefill and cached steps
"""
