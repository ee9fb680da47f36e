"""The model: configuration, speech and emotion tower, projector, scoped LoRA, checkpoints, and `modeling_relllm`, in
which all of it comes together. They become flat files on the Hub, so each imports only siblings of this folder.
"""
