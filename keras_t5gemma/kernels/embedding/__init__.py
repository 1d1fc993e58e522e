"""Tables of embeddings: lookups, and products with quantized tables.

lookup       rows of a table, whatever it holds
reference    rows as Keras looks them up
jax          without a float copy of the table in decoding, and with a gradient that is made when it is needed
quantized    rows of int4 tables, and products with int8 and int4 tables, in blocks
"""

PACKAGE = __name__
