"""The OpenAI-compatible server of `relllm serve`, which needs the extra `relllm[serve]`.

A request goes from `app.py` (routes; `schema.py`) through `prompts.py` (clips, conversation, limits) to `engine.py`
(the queue and the model's thread), in which groups of replies are written (`writing.py`). `server.py` is around it.
"""
