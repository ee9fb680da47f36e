"""`python -m relllm`, where the command is not on the path."""

from relllm.cli import main

main()
