"""The OpenAI-compatible server of `relllm serve`, which needs the extra `relllm[serve]`.

A request goes from `app.py` (routes; `schema.py`, `errors.py`) through `prompts.py` (clips, conversation, limits) to
`engine.py` (the queue and the model's thread), in which groups of replies (`writing.py`) are written, each a row of
`decoding.py`. `server.py` starts and ends it.
"""
