"""Measuring a model (`evaluating.py`, `predicting.py`, `summary.py`), and runs side by side (`comparison.py`)."""
