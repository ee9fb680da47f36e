"""The demos: `tiny.py` trains everything from nothing, `pretrained.py` joins Whisper tiny.en and SmolLM2.

What they share is in `steps.py`; `sentences.py` is the second one's corpus, `understanding.py` its own measurements.
"""
