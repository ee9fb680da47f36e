# Copyright 2026 The RE-LLM contributors. Licensed under the Apache License, Version 2.0.
"""Measuring as the paper does: `recognition.py` (UA, WA, F1), `dimensions.py` (CCC), `plots.py`."""
