"""Measuring as the paper does.

A run: `evaluation_settings.py` → `evaluating.py` (`predicting.py`, `asking.py`, `fingerprints.py`) → `summary.py`,
`folds.py`; `empathy/` scores replies. Runs side by side: `runs.py` → `comparison.py` (`statistics.py`) →
`comparison_tables.py` (`tables.py`).
"""
