"""The same rows in each form that `fit` takes: dicts, datasets, loaders, generators, Hugging Face's columns."""

import grain
import keras
import numpy as np

# Rows of unequal length, the longest in each batch of 4, 4 and 2.
QUESTIONS = (
    *("Why is the sky blue? And why?", "apples", "pears and plums", "2 + 2"),
    *("Why is the sky blue? And why?", "user", "take turns", "a lazy dog jumps"),
    *("Why is the sky blue? And why?", "fox"),
)
ANSWERS = (
    *("Because air scatters blue light.", "12", "34 and 56", "four"),
    *("Because air scatters blue light.", "model", "yes", "over the fox"),
    *("Because air scatters blue light.", "dog"),
)
BATCH = 4


def texts():
    return {"encoder_text": list(QUESTIONS), "decoder_text": list(ANSWERS)}


def cut(column, mask):
    return [row[keep != 0].tolist() for row, keep in zip(column, mask, strict=True)]


def lists(arrays):
    """Ids and labels of unequal length."""
    x, y, weights = arrays
    sides = ("encoder", "decoder")
    rows = {f"{side}_token_ids": cut(x[f"{side}_token_ids"], x[f"{side}_padding_mask"]) for side in sides}
    return rows, [[*row, -100] for row in cut(y, weights)]


def hugging_face(arrays):
    """Columns as `transformers`' data have them."""
    rows, labels = lists(arrays)
    ids = rows["encoder_token_ids"]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}


def slices(batch, size=BATCH):
    """Batches of a nested structure of columns."""
    if isinstance(batch, tuple):
        return list(zip(*(slices(part, size) for part in batch), strict=True))
    if isinstance(batch, dict):
        return [
            dict(zip(batch, parts, strict=True))
            for parts in zip(*(slices(c, size) for c in batch.values()), strict=True)
        ]
    return [batch[start : start + size] for start in range(0, len(batch), size)]


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def loader(batch):
    import torch

    return torch.utils.data.DataLoader(slices(batch, 1), batch_size=BATCH, collate_fn=joined)


def joined(rows):
    """Rows of one in a batch, as PyTorch's own `collate` does it for tensors."""
    if isinstance(rows[0], tuple):
        return [joined(parts) for parts in zip(*rows, strict=True)]
    if isinstance(rows[0], dict):
        return {name: joined([row[name] for row in rows]) for name in rows[0]}
    if isinstance(rows[0], list):
        return [entry for row in rows for entry in row]
    import torch

    return torch.tensor(np.concatenate(rows))


def tf_data(batch):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(batch).batch(BATCH)


def ragged(arrays):
    import tensorflow as tf

    rows, labels = lists(arrays)
    x = {name: tf.ragged.constant(column, dtype="int32") for name, column in rows.items()}
    return tf.data.Dataset.from_tensor_slices((x, tf.ragged.constant(labels, dtype="int32"))).batch(BATCH)


def batch_encoding(arrays):
    from transformers import BatchEncoding

    return BatchEncoding(hugging_face(arrays))


def hugging_face_dataset(columns):
    import datasets

    return datasets.Dataset.from_dict({**columns, "id": list(range(len(QUESTIONS)))})


def grain_rows(batch):
    rows = [keras.tree.map_structure(lambda column: column[0], row) for row in slices(batch, 1)]
    return grain.MapDataset.source(rows).batch(BATCH)


def collated(arrays):
    """Batches of a seq2seq collator: labels padded with -100."""
    for batch in slices(hugging_face(arrays)):
        widths = {name: max(map(len, column)) for name, column in batch.items()}
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        yield {
            name: np.array([row + [fills[name]] * (widths[name] - len(row)) for row in column])
            for name, column in batch.items()
        }
