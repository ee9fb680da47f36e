"""Measuring as the paper does.

- A run of `relllm evaluate`: `planning.py` → `run.py` (asking: `asking.py`, `predicting.py`, `answers.py`) →
  `summary.py`, `folds.py`, `report.py`; `fingerprints.py` says what was measured.
- Empathy scorers: `empathy_*.py`.
- Runs side by side: `runs.py` → `comparison.py` (`measures.py`, `statistics.py`, `published.py`) →
  `comparison_tables.py`, `tables.py`.
"""
