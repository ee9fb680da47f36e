"""Training: read `run.py`, the order of a run, `config.py`, its settings, then `trainer.py` and `collator.py`.

`emotion_training.py` trains the emotion tower, `planning/` says what a run takes. Nothing is imported: TRL is slow.
"""
