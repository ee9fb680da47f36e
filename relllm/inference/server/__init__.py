"""The OpenAI-compatible server: `relllm serve`. It needs the extra `relllm[serve]`."""
