"""Training: data, losses, optimizers, callbacks and checkpoints for `fit`.

batches/        data of `fit` in any form, as arrays
callbacks/      warm-up, logs, progress, plots
checkpointing/  runs that resume
losses/         cross-entropy, distillation
optimizers/     AdamW, Adafactor, Muon; bfloat16
steps/          the training step of a batch in parts
evaluation      Held-out loss, overall and per denoiser
"""
