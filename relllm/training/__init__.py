"""Training: read `run.py`, the order of a run, `config.py`, its settings, then `trainer.py` and `collator.py`.

`emotion_training.py` trains the emotion tower, `plan.py` says what a run will take. TRL is slow: nothing is imported.
"""
