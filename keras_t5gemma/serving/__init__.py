"""Serving a trained model: continuous batching.

answers       An answer while its tokens arrive: pieces of text, stop strings, and the result
batcher       `Batcher`: many requests at a time, each answered as if it were alone
draws         The next token of each row, by options that are numbers per row
http/         `Server`: OpenAI's API over HTTP
handles       Handles, answers, and the errors of a batcher
model_thread  The thread that owns the slots
requests      A request: a prompt as arrays, and its options, checked
rows          Options of the requests in the slots, as arrays
slots         The slots: rows of one decoding batch, each at a position of its own, and their programs
"""
