"""Corpora as rows: read `rows.py` first, the row that all others make or take.

`corpora/` reads a corpus (with `parsing.py`), `preparing.py` writes a data set (`clips.py`, `report.py`, `card.py`),
`loading.py` reads it, `inspection.py` looks at it, `replies/` and `annotate.py` add columns.
"""
