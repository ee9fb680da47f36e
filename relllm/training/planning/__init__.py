"""What a run takes, before it is started.

`memory.py` counts the memory of a step; `plan.py` turns it into the largest batch and the time.
"""
