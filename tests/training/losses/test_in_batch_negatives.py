"""`InBatchNegatives` against sentence-transformers' losses and against plain numpy, value and gradient."""

import numpy as np
import pytest
from helpers.gradients import gradients
from keras import ops

import keras_t5gemma as kt

ROWS, WIDTH = 6, 12
OPTIONS = {
    "pairs": ({}, 2),
    "hard_negatives": ({"temperature": 0.1}, 3),
    "two_hard_negatives": ({}, 4),
    "symmetric": ({"symmetric": True}, 2),
    "symmetric_negatives": ({"symmetric": True}, 3),
    "matryoshka": ({"matryoshka": (12, 8, 3)}, 3),
}


def embeddings(columns, seed=0):
    """Of any length, each document near its query."""
    generator = np.random.default_rng(seed)
    own = generator.standard_normal((ROWS, 1, WIDTH))
    noise = generator.standard_normal((ROWS, columns, WIDTH))
    return ((own + noise) * generator.uniform(0.3, 3, (ROWS, columns, 1))).astype("float32")


def distinct(columns):
    return np.arange(ROWS * columns, dtype="int32").reshape(ROWS, columns)


def value_and_gradient(loss, numbers, x, weights=None):
    value = float(ops.convert_to_numpy(loss(ops.convert_to_tensor(numbers), ops.convert_to_tensor(x), weights)))
    return value, gradients(lambda x: loss(ops.convert_to_tensor(numbers), x, weights), x)[0]


def by_sentence_transformers(x, temperature=0.05, matryoshka=None, symmetric=False):
    """The loss and its gradient by torch."""
    import torch
    from sentence_transformers.sentence_transformer import losses

    class Given(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["embedding"]}

        def get_embedding_dimension(self):
            return WIDTH

    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    model = Given()
    loss = losses.MultipleNegativesRankingLoss(
        model, scale=1 / temperature, directions=directions, partition_mode="per_direction"
    )
    if matryoshka:
        loss = losses.MatryoshkaLoss(model, loss, list(matryoshka))
    tensor = torch.tensor(x, requires_grad=True)
    columns = [{"embedding": tensor[:, column]} for column in range(x.shape[1])]
    value = loss(columns, None) / len(matryoshka or (1,))
    value.backward()
    return value.item(), tensor.grad.numpy()


def by_numpy(numbers, x, temperature=0.05):
    """Losses [B] of the definition, in float64, one query at a time."""
    x = np.asarray(x, "float64")
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    losses = []
    for i, row in enumerate(numbers):
        own, others = None, []
        for j, other in enumerate(numbers):
            for column in range(1, len(row)):
                cosine = x[i, 0] @ x[j, column] / temperature
                if (j, column) == (i, 1):
                    own = cosine
                elif other[column] >= 0 and other[column] != row[1] and not (column == 1 and other[0] == row[0]):
                    others.append(cosine)
        losses.append(np.log(np.sum(np.exp([own, *others]))) - own)
    return np.array(losses)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_are_those_of_sentence_transformers(name):
    options, columns = OPTIONS[name]
    x = embeddings(columns)
    value, gradient = value_and_gradient(kt.InBatchNegatives(**options), distinct(columns), x)
    expected, expected_gradient = by_sentence_transformers(x, **options)
    assert value > 0.1
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-6)


def test_copies_of_a_document_and_documents_of_the_same_query_are_no_negatives():
    numbers, x = distinct(3), embeddings(3)
    numbers[1, 1] = numbers[0, 1]  # one document twice
    numbers[3, 0] = numbers[2, 0]  # one query twice
    numbers[4, 2] = numbers[5, 1]  # one row's hard negative is another row's document
    numbers[5] = -1  # a row that only fills the batch
    loss = kt.InBatchNegatives(reduction="none")
    found = ops.convert_to_numpy(loss(numbers, x))
    expected = by_numpy(numbers, x)
    np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-5, atol=1e-6)
    assert np.all(by_numpy(distinct(3), x)[:4] > expected[:4] + 1e-7)
    weights = np.array([1, 2, 0, 1, 1, 0], "float32")
    weighted = float(kt.InBatchNegatives()(numbers, x, weights))
    np.testing.assert_allclose(weighted, (expected[:5] @ weights[:5]) / weights.sum(), rtol=1e-5)


def test_symmetric_loss_leaves_out_copies_in_both_directions():
    numbers, x = distinct(2), embeddings(2)
    numbers[1, 1], numbers[3, 0] = numbers[0, 1], numbers[2, 0]
    found = ops.convert_to_numpy(kt.InBatchNegatives(symmetric=True, reduction="none")(numbers, x))
    turned = by_numpy(numbers[:, ::-1], x[:, ::-1])
    np.testing.assert_allclose(found, (by_numpy(numbers, x) + turned) / 2, rtol=1e-5, atol=1e-6)


def test_a_row_alone_and_a_vector_of_zeros_have_finite_gradients():
    x = embeddings(2)[:1]
    value, gradient = value_and_gradient(kt.InBatchNegatives(), distinct(2)[:1], x)
    assert (value, np.abs(gradient).max()) == (0, 0)
    x = embeddings(2)
    x[2, 1] = 0
    value, gradient = value_and_gradient(kt.InBatchNegatives(), distinct(2), x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_correct_is_what_ranks_its_own_document_first_alone():
    x = embeddings(3)
    x[0, 1] = x[0, 0]  # found
    x[1, 2] = x[1, 0]  # its hard negative is nearer
    x[2, 1] = x[3, 1] = x[2, 0]  # a tie, but for equal texts
    found = ops.convert_to_numpy(kt.InBatchNegatives().is_correct(distinct(3), x))
    assert found[:3].tolist() == [1, 0, 0]
    numbers = distinct(3)
    numbers[3, 1] = numbers[2, 1]
    assert ops.convert_to_numpy(kt.InBatchNegatives().is_correct(numbers, x))[2] == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"matryoshka": (8, 0)}, "matryoshka"),
        ({"matryoshka": 8}, "matryoshka"),
        ({"matryoshka": ()}, "matryoshka"),
        ({"symmetric": 1}, "symmetric=1"),
    ],
)
def test_bad_option_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        kt.InBatchNegatives(**options)


def test_width_beyond_the_embeddings_is_refused():
    with pytest.raises(ValueError, match=r"12\. Received: \(16, 8\)"):
        kt.InBatchNegatives(matryoshka=(16, 8))(distinct(2), embeddings(2))
