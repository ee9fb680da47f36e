"""Model cards, and checkpoints on the Hub: what a repository holds, the checks before a push, push and pull."""
