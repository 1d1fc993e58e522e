"""Callbacks for `fit`, except checkpoints.

cross_attention_warmup  `CrossAttentionWarmup`: trains cross-attention alone at first
log_file                The log of a run as a CSV file: reading, writing, and appending to it. Works without Keras
plots                   Plots of runs by Matplotlib, the extra `plots`. Works without Keras
progress_bar            The progress bar of a run: loss, tokens per second and the time left
training_log            `TrainingLog`: the numbers of a run, one row per epoch, as a CSV file and for TensorBoard
"""
