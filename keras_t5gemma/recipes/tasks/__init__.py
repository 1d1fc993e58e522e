"""The section `[task]` of a recipe: a model with a head, its data and its held-out measurement.

heads             The heads by name
held_out          Measures held-out rows in the middle of a run
model             Builds and compiles a model with a head
rows              The rows of files, with errors that show the row
text_classifier   Rows with a text or a pair, and a label
text_embedder     Rows with a query, a document and perhaps hard negatives
token_classifier  Rows with words, and a label per word
"""
