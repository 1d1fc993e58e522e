"""Losses over a large vocabulary, losses of embeddings, and teachers.

answers         Several answers per prompt: one encoder pass, a decoder row per answer; and losses of them
checks          Checks of the loss that a model is compiled with
cross_entropy   Cross-entropy over a large vocabulary without its logits: [B, T, 256000] of float32 never exists
distillation    Learning from a teacher's logits (Hinton et al., arXiv 1503.02531) without a tensor of all logits
in_batch_negatives  For each query its own document against all others of the batch
labels          Labels and their weights: -100 has weight 0, and a label of weight 0 may be any number
log_probs       The log-probabilities of target tokens, differentiable, without the logits [R, T, V]
preference      Learning from preferences between answers: DPO, IPO, SimPO, CPO, ORPO, KTO and others
preference_formulas  The formulas of `PreferenceLoss`, one function per kind
reference       The reference's log-probabilities of answers, computed once and kept in a folder
stored_teacher  A teacher's logits on disk: computed once, and read in place of the teacher
teachers        Teachers of `Distillation`: the arrays that each provides for a batch
"""
