"""keras-hub's T5Gemma of Small-Small size."""

import keras_hub

STACKS = ("encoder", "decoder")


def backbone(dtype, encoder_layers=8):
    """With vocabulary 256,000 and random weights."""
    sizes = dict(hidden_dim=512, intermediate_dim=1024, num_layers=8, num_attention_heads=8, num_key_value_heads=8)
    sizes |= dict(head_dim=64, layer_types=["sliding_attention", "full_attention"] * 4)
    both = {f"{stack}_{name}": value for stack in STACKS for name, value in sizes.items()}
    both |= {"encoder_num_layers": encoder_layers, "encoder_layer_types": both["encoder_layer_types"][:encoder_layers]}
    return keras_hub.models.T5GemmaBackbone(
        vocabulary_size=256_000,
        query_pre_attn_scalar=64,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        cross_attention_hidden_size=512,
        dtype=dtype,
        **both,
    )
