"""Empathy of replies, as EPITOME measures it.

`scorer.py`, the model → `epitome.py`, its pairs → `scorer_training.py` → `scoring.py`, levels of replies.
"""
