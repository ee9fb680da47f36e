"""What a run takes, before a GPU is rented: read `plan.py`, the command, then `memory.py`, its estimate."""
