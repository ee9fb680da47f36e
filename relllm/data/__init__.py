"""Corpora as rows: `rows.py` is the row, one file reads each corpus, `preparing.py` writes what `loading.py` reads."""
