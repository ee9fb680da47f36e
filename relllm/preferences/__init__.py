"""Empathy as the goal of training: rewards of replies, pairs of a better and a worse one, and training on both.

`rewards.py` scores replies by name. Trainers and `relllm score-replies` take it from there.
"""
