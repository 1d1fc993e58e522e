"""Grain pipelines from texts to batches.

dataset        Texts to batches of examples: a Grain dataset that `fit` takes on every backend
mixed_sources  Several sources of texts or rows as one, each in a share of its own
packing        Packs several examples into one row: rows are full, and each example sees only itself
pairs          Pairs of a prompt and an answer: rows in any form, and their ids
preferences    Prompts with a chosen and a rejected answer to batches, two decoder rows per prompt
streams        Stages of Grain pipelines: documents, examples, rows, batches. Each can save its position
supervised     Questions with their answers, and chats, to batches with loss on the answers only
teacher_view   The tokens that a decoder-only teacher reads for a batch, and the positions at which it predicts labels
"""
