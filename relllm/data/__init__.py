# Copyright 2026 The RE-LLM contributors. Licensed under the Apache License, Version 2.0.
"""Corpora as rows: `rows.py` is the row, `synthetic.py` the corpus of the demo (spoken by `espeak.py`)."""
