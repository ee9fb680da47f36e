"""Measuring as the paper does: `recognition.py` (UA, WA, F1), `dimensions.py` (CCC), `plots.py`."""
