"""Model cards, and checkpoints to share: `cards.py`, made from `evidence.py` and `licences.py`; `push.py`, which sends
what `files.py` lets go and `staging.py` lays out (and merges). `sharing.py` has the settings of the commands.
"""
