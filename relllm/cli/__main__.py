"""`python -m relllm.cli`, which `accelerate launch -m` needs."""

from . import main

main()
