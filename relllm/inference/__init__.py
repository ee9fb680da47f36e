"""A trained model at work.

Read `replies.py` first (one reply, one emotion), then `conversation.py` (many turns, nothing computed twice) and
`text_conversation.py` (a bare LLM beside it); `web/` is the page, `server/` the OpenAI-compatible server.
"""
