"""The page of `relllm web`: `session.py` holds one visitor's conversation, `drawing.py` draws, `page.py` is Gradio."""
