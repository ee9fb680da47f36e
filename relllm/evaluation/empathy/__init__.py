"""Scorers of empathy.

`epitome.py` reads the pairs, `scorer.py` is the model, `scorer_training.py` trains one, `scoring.py` uses it.
"""
