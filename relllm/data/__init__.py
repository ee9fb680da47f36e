"""Corpora as rows: read `rows.py` first, the row that all others make or take."""
