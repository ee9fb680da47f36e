"""A trained model at work.

Read `replies.py` first (one reply, what was heard), then `conversation.py` (many turns, nothing computed twice) and
`text_conversation.py` (a bare LLM beside it); `web.py` is the page, `server/` the OpenAI-compatible server, `vllm/`
the plugin of vLLM.
"""
