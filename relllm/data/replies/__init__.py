"""The replies to learn.

`writers.py` asks a chat LLM, `cleaning.py` refuses what is no reply, `targets.py` runs both over a data set.
"""
