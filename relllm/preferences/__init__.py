"""Empathy as the goal of training: rewards of replies, pairs of a better and a worse one, and training on both.

`rewards.py`, a reply's scores by name; `sampling.py` → `pairs.py`, best and worst of several replies to a clip.
"""
