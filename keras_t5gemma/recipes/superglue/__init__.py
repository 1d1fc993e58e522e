"""The paper's fine-tuning on SuperGLUE: seven tasks, a grid of hyperparameters each, the mean of the best accuracies.

cells     The grid of a task, and the results of its cells on disk. Needs no Keras
report    The results of all tasks as a table. Needs no Keras
run       Trains the grids of all tasks, and continues where it was stopped
spans     Marks the noun and the pronoun in a text of WSC. Needs no Keras
tasks     The seven tasks: their files, texts and labels. Needs no Keras
training  Trains one cell
"""
