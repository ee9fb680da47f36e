"""Copy the part of a recorded reference set that fits into the repository.

    python scripts/copy_golden_subset.py SOURCE

A full set takes 5 MB; this part, under 2 MB, still tests most kinds of comparison. Left out is what follows from the
rest (log-mels and waveforms of the larger batch), what another case covers, and what only a large tensor could add:
the losses and gradient norms of those cases are numbers in `description.json`, and stay tested. Only a full set tests
BLSP-Emo's own projector and the one with transformer layers.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

TARGET = Path(__file__).parent.parent / "tests" / "golden_tensors"
MAX_BYTES = 2_000_000
# File: beginnings of the names to leave out. Files that are not here are not copied.
LEFT_OUT = {
    "weights": ("adapter.", "w2v2_adapter.", "w2v2_hidden2emotion."),
    "inputs_b1": (),
    "inputs_b3": ("speech_values",),
    "forward_b1_lora": ("adapter.input", "w2v2."),
    "forward_b3_lora": ("adapter.input", "llm.speech_hidden.1", "llm.text", "w2v2.", "llm.position_ids"),
    "forward_b1_nolora": ("llm.speech_hidden.0", "llm.speech_hidden.1", "llm.text", "llm.position_ids"),
    "qwen_text": (),
    "generate_b1_lora": (),
    "generate_b3_lora": ("prompt_all_logits", "lora_mask"),
    "grads_b3_lora": ("w2v2cat_adapter.subsampler.",),
    "adamw_after5_b3_lora": (),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder with a full recorded set")
    source = parser.parse_args().source
    TARGET.mkdir(parents=True, exist_ok=True)
    description = json.loads((source / "description.json").read_text())
    del description["files"]  # shapes and meanings of all tensors: 60 kB that no test reads
    (TARGET / "description.json").write_text(json.dumps(description, indent=1) + "\n")
    for name, left_out in LEFT_OUT.items():
        tensors = load_file(source / f"{name}.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(left_out)}
        save_file(kept, TARGET / f"{name}.safetensors")
    total = sum(path.stat().st_size for path in TARGET.iterdir())
    print(f"{total:,} bytes in {TARGET}")
    if total > MAX_BYTES:
        raise SystemExit(f"That is over {MAX_BYTES:,} bytes. Leave out more.")


if __name__ == "__main__":
    main()
