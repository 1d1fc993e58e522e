"""Callbacks of a run beside checkpoints.

cross_attention_warmup  `CrossAttentionWarmup`: trains cross-attention alone at first
log_file                The log of a run as a CSV file: reading, writing, and appending to it. Needs no Keras
plots                   Plots of runs by Matplotlib, the extra `plots`. Needs no Keras
progress_bar            The progress bar of a run: loss, tokens per second and the time left
training_log            `TrainingLog`: the numbers of a run, one row per epoch, as a CSV file and for TensorBoard
"""
