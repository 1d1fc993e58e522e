"""An HTTP server with OpenAI's API, on Starlette and uvicorn, which are imported when a server is made.

app           The endpoints as an ASGI application: keys, errors, counts
bodies        The JSON body of a request: its fields, checked before anything is computed
chat          `POST /v1/chat/completions`
choices       The choices of one HTTP request, followed by the event loop
clients       Clients that leave; streams of events
completing    What both kinds of completions share
completions   `POST /v1/completions`
embeddings    `POST /v1/embeddings`
errors        Errors in OpenAI's shape
log_probs     Log-probabilities of an answer's tokens
metrics       Numbers for Prometheus
places        Where a server listens, and whether what it needs is installed; without Keras
sampling      The fields that completions and chat completions share
server        `Server`: a model that answers over HTTP
service       The model behind the endpoints, and whether it is ready
vectors       Vectors of texts by a fixed set of programs
"""
