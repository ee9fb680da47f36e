"""Corpora as rows: `rows.py` is the row, `synthetic.py` the corpus of the demo (spoken by `espeak.py`)."""
