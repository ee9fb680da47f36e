"""Training: the trainer and its settings, the collator, the losses. Nothing is imported here: TRL is slow to load."""
