"""Flax's T5Gemma checkpoints, written by Orbax itself."""

import numpy as np
import orbax.checkpoint

NAMES = {
    "pre_attention_norm": "pre_self_attn_layernorm",
    "post_attention_norm": "post_self_attn_layernorm",
    "pre_cross_attention_norm": "pre_cross_attn_layernorm",
    "post_cross_attention_norm": "post_cross_attn_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def flax_tree(config, weights, transposed=()):
    """The parameters of Flax's T5Gemma, nested as Flax nests them, from the Hugging Face model's weights.

    Args:
        config: the `T5GemmaConfig`.
        weights: Hugging Face's tensors by name, as numpy arrays.
        transposed: the stacks whose `gating_einsum` is [2, F, D] rather than [2, D, F], as 9B's.
    """
    return {
        stack: {
            "embedder": {"input_embedding": weights[f"model.{stack}.embed_tokens.weight"]},
            **{
                f"layer_{i}": flax_layer(
                    getattr(config, stack),
                    lambda name, prefix=f"model.{stack}.layers.{i}": weights[f"{prefix}.{name}.weight"],
                    cross_attention=stack == "decoder",
                    transposed=stack in transposed,
                )
                for i in range(getattr(config, stack).num_layers)
            },
            "final_norm": {"scale": weights[f"model.{stack}.norm.weight"]},
        }
        for stack in ("encoder", "decoder")
    }


def flax_layer(sizes, weight, cross_attention, transposed):
    def heads(name):  # [N H, D] -> [N, D, H]
        matrix = weight(name)
        return np.ascontiguousarray(matrix.reshape(-1, sizes.head_dim, matrix.shape[1]).transpose(0, 2, 1))

    def attention(name, one_parameter):
        query, key, value = (heads(f"{name}.{letter}_proj") for letter in "qkv")
        output = weight(f"{name}.o_proj")  # [D, N H] -> [N, H, D]
        inputs = (
            {"qkv_einsum": {"w": np.stack([query, key, value])}}
            if one_parameter
            else {"q_einsum": {"w": query}, "kv_einsum": {"w": np.stack([key, value])}}
        )
        output = np.ascontiguousarray(output.T).reshape(-1, sizes.head_dim, len(output))
        return {**inputs, "attn_vec_einsum": {"w": output}}

    gating = np.stack([weight("mlp.gate_proj"), weight("mlp.up_proj")])  # [2, F, D]
    layer = {
        "attn": attention("self_attn", sizes.num_query_heads == sizes.num_key_value_heads),
        "mlp": {
            "gating_einsum": gating if transposed else np.ascontiguousarray(gating.transpose(0, 2, 1)),
            "linear": np.ascontiguousarray(weight("mlp.down_proj").T),
        },
    }
    if cross_attention:
        layer["cross_attn"] = attention("cross_attn", False)
    for flax, hugging_face in NAMES.items():
        if cross_attention or "cross" not in flax:
            layer[flax] = {"scale": weight(hugging_face)}
    return layer


def flat_tree(tree):
    """The tree in the flat form that Gemma's first checkpoints have."""
    flat = {}

    def walk(prefix, node):
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}/{key}", value)
            elif prefix.endswith("/mlp"):
                flat[f"{prefix}/{key}"] = {"w": value}
            else:
                flat.setdefault(prefix, {})[key] = value

    walk("transformer", tree)
    return flat


def write(folder, tree, **options):
    with orbax.checkpoint.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(folder.resolve(), tree)
    return folder
