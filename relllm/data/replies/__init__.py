"""The replies to learn: who writes them, and which are refused."""
