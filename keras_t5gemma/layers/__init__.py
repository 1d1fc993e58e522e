"""The layers of one block, in `keras.ops`; no backend is named here.

attention        Grouped-query attention as a layer: projections and RoPE
block            One block of a stack: self-attention, a decoder's cross-attention, and a feed-forward
cache            The key and value cache of decoding: one slot per position
copies           The error for copying a model layer by layer
dense            A matrix product as a layer, without bias or activation
embedding        An embedding table as a layer, which is quantized a block of rows at a time
feed_forward     The gated feed-forward of Gemma 2
initialization   Initial values of a layer's weights: random numbers, or the checkpoint that is being read
lora             LoRA (arXiv 2106.09685): chooses layers and ranks, and merges LoRA into the weights
norm             RMSNorm with a `1 + scale` weight, as Gemma stores it
pooling          From a stack's output to one vector per text: the mean of its tokens, or its last token
projection       From the decoder's hidden states to logits over the vocabulary
rope             Rotary position embeddings (RoPE, arXiv 2104.09864)
saved_variables  Layers that are saved and loaded unchanged: with their quantizers and with LoRA
"""
