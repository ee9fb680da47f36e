"""Systems that a ReLLM is compared with and that need a training of their own."""
