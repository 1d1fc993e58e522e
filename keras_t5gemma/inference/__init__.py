"""What a trained model is asked: `generate`, `stream`, `score`, `embed`.

decoding/          the loop
programs/          compiled and recorded programs
samplers/          beam search, top-k and top-p
arrays             Prompts and targets as arrays, checked, and results as the user gets them
buckets            `Buckets`: rounds batch sizes and lengths up, so that few programs are compiled
embed              `embed`: texts as vectors, the pooled output of the encoder
generate           `generate`: texts or token ids from prompts
logits_processors  Logits processors: change which token may come next. They compose, and work with every sampler
memory             Requests that are too large for memory: recognized
score              `score`: the log-probabilities of given targets
stream             `stream`: generated text as it comes
"""
