import dataclasses

import numpy as np
import pytest
from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.kernels.cache_update import write_at
from keras_t5gemma.kernels.soft_cap import soft_cap
from keras_t5gemma.layers.attention import Attention
from keras_t5gemma.layers.feed_forward import FeedForward
from keras_t5gemma.layers.norm import RMSNorm
from keras_t5gemma.layers.rope import rotary_angles, rotate

CONFIG = StackConfig(
    num_layers=1,
    hidden_dim=10,
    intermediate_dim=14,
    num_query_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    attention_soft_cap=1.5,
    initializer_range=0.7,
)
GENERATOR = np.random.default_rng(0)


def to_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def normal(*shape):
    return GENERATOR.standard_normal(shape).astype("float32")


def test_rms_norm_is_x_over_root_mean_square_times_one_plus_scale():
    norm, x, scale = RMSNorm(epsilon=0.3), normal(2, 3, 10), normal(10)
    norm.build(x.shape)
    norm.scale.assign(scale)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.3) * (1 + scale)
    np.testing.assert_allclose(to_numpy(norm(x)), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_in_bfloat16_rounds_only_at_the_end():
    norm, x = RMSNorm(dtype="bfloat16"), np.full((1, 1, 10), 1.0, "float32")
    norm.build(x.shape)
    norm.scale.assign(np.full(10, 2.0**-7))  # 1 + scale is a bfloat16, but only just
    assert (to_numpy(norm(ops.cast(x, "bfloat16"))) == 1 + 2.0**-7).all()


def test_feed_forward_is_down_of_gelu_gate_times_up():
    layer, x = FeedForward(CONFIG), normal(2, 3, 10)
    layer.build(x.shape)
    gate, up, down = (to_numpy(dense.kernel) for dense in (layer.gate_dense, layer.up_dense, layer.down_dense))
    gate = x @ gate
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    np.testing.assert_allclose(to_numpy(layer(x)), (gelu * (x @ up)) @ down, rtol=1e-4, atol=1e-5)


def test_rotation_makes_products_depend_on_distance_only():
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8)

    def product(q, k):
        rotated = [rotate(ops.convert_to_tensor(x), rotary_angles(1, at, 8, 50.0)) for x, at in ((query, q), (key, k))]
        return float(to_numpy(ops.sum(rotated[0] * rotated[1])))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-2)


def test_rotation_turns_the_halves_by_position_over_wavelength():
    x = np.zeros((1, 2, 1, 4), "float32")
    x[..., 0] = 1.0
    got = to_numpy(rotate(ops.convert_to_tensor(x), rotary_angles(2, 5, 4, 100.0)))
    np.testing.assert_allclose(got[0, :, 0, 0], np.cos([5, 6]), atol=1e-6)
    np.testing.assert_allclose(got[0, :, 0, 2], np.sin([5, 6]), atol=1e-6)


def test_soft_cap_of_none_changes_nothing():
    assert soft_cap(3.0, None) == 3.0


def plain_attention(layer, x, source, mask, rope):
    """Attention head by head, as the formula reads."""
    config = layer.config
    kernels = {n: to_numpy(getattr(layer, f"{n}_dense").kernel) for n in ("query", "key", "value", "output")}
    size, heads = config.head_dim, config.num_query_heads
    query = (x @ kernels["query"]).reshape(*x.shape[:2], heads, size)
    key = (source @ kernels["key"]).reshape(*source.shape[:2], -1, size)
    value = (source @ kernels["value"]).reshape(*source.shape[:2], -1, size)
    if rope:
        angles = [rotary_angles(n, 0, size, config.rope_wavelength) for n in (x.shape[1], source.shape[1])]
        query, key = (to_numpy(rotate(ops.convert_to_tensor(t), a)) for t, a in zip((query, key), angles, strict=True))
    out = np.zeros((*x.shape[:2], heads, size), "float32")
    for b, t, n in np.ndindex(*x.shape[:2], heads):
        k = n // (heads // config.num_key_value_heads)
        logits = key[b, :, k] @ query[b, t, n] * config.query_scale
        if config.attention_soft_cap is not None:
            logits = config.attention_soft_cap * np.tanh(logits / config.attention_soft_cap)
        seen = mask[b, t]
        if seen.any():
            weights = np.exp(logits[seen] - logits[seen].max())
            out[b, t, n] = weights / weights.sum() @ value[b, seen, k]
    return out.reshape(*x.shape[:2], -1) @ kernels["output"]


@pytest.mark.parametrize("rope", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize("changes", [{}, {"query_scalar": 0.5}, {"attention_soft_cap": None}, {"rope_wavelength": 3.0}])
def test_attention_equals_the_formula_head_by_head(rope, changes):
    config = dataclasses.replace(CONFIG, **changes)
    layer = Attention(config)
    x, source = normal(2, 5, 10), normal(2, 5 if rope else 7, 10 if rope else 12)
    layer.build(x.shape, source.shape)
    mask = GENERATOR.random((2, 5, source.shape[1])) < 0.6
    mask[0, 2] = False
    angles = rotary_angles(5, 0, config.head_dim, config.rope_wavelength) if rope else None
    got = layer(x, layer.keys_values(ops.convert_to_tensor(source), angles), ops.convert_to_tensor(mask), angles)
    expected = plain_attention(layer, x, source, mask, rope)
    np.testing.assert_allclose(to_numpy(got), expected, rtol=1e-4, atol=1e-5)
    assert (to_numpy(got)[0, 2] == 0).all()  # it saw nothing


def test_write_at_replaces_these_positions_only():
    buffer, update = normal(2, 6, 3), normal(2, 2, 3)
    expected = buffer.copy()
    expected[:, 3:5] = update
    got = write_at(ops.convert_to_tensor(buffer.copy()), ops.convert_to_tensor(update), 3)
    np.testing.assert_array_equal(to_numpy(got), expected)
