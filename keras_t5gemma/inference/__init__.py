"""Inference with a trained model: `generate`, `stream`, `score`, `embed`, `encode`.

decoding/          the loop
programs/          compiled and recorded programs
samplers/          beam search, top-k and top-p
arrays             Converts prompts and targets to arrays, checks them, and converts results back
buckets            `Buckets`: rounds batch sizes and lengths up, so that few programs are compiled
embed              `embed`: texts as vectors, the pooled output of the encoder
encode             `encode`: prompts that the encoder has read already, for any number of calls
generate           `generate`: texts or token ids from prompts
logits_processors  Logits processors: change which token may come next. They compose, and work with every sampler
memory             Out-of-memory errors: recognized, and explained by the size of the request
score              `score`: the log-probabilities of given targets
stops              Stop strings: rows of tokens that end with a text
stream             `stream`: generated text, chunk by chunk
"""
