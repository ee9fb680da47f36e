"""The demo in minutes: `tiny.py` trains a whole RE-LLM from nothing, with the steps of `steps.py`.

Its corpus is `synthetic.py` (words in `synthetic_text.py`, spoken by `espeak.py`), which `relllm prepare` writes too.
"""
