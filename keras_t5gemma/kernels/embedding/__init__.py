"""Tables of embeddings: lookups, and products with quantized tables.

lookup       rows of a table of any dtype
reference    Keras's own lookup
jax          no float32 copy of the table in decoding, and a gradient that is allocated when it is needed
quantized    rows of int4 tables, and products with int8 and int4 tables, in blocks
"""

PACKAGE = __name__
