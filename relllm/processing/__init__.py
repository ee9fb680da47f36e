"""From audio and text to tensors: `audio_relllm`, the one reader of clips, then `feature_extraction_relllm`, then
`prompts_relllm` (wording and chat templates) and `processing_relllm`, in which they meet. They become flat files on
the Hub, so each imports only siblings of this folder.
"""
