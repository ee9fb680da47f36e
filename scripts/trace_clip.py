"""How often one clip changes file inside the package: on its way to a reply, and in a training step.

Counted are the pairs of functions of which one calls the other across files of `relllm`, each once (what Transformers,
TRL and PyTorch do in between does not count), on tiny random towers: a number of the house, not of speed.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import soundfile
from datasets import Dataset

import relllm
from relllm.inference.conversation import Conversation

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny_models import clip, tiny_model, tiny_processor

PACKAGE = str(Path(relllm.__file__).parent)


def count_hops(run: Callable[[], object]) -> int:
    """Calls from file to file of the package while `run` runs in this thread."""
    hops: set[tuple[object, object]] = set()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != frame.f_code.co_filename:
            hops.add((caller.f_code, frame.f_code))

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(hops)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "clip.wav"
        soundfile.write(wav, clip(1.0), 16_000)
        model, processor = tiny_model().eval(), tiny_processor()
        Conversation(model, processor).say(wav, max_new_tokens=1)
        print("reply", count_hops(lambda: Conversation(model, processor).say(wav, max_new_tokens=1)))
        row = {"id": "a", "audio": str(wav), "text": "hello", "response": "Tell me more.", "emotion": "sad"}
        row |= {"arousal": 0.5, "dominance": 0.5, "valence": 0.5}
        settings = {"output_dir": folder, "max_steps": 1, "per_device_train_batch_size": 1, "use_cpu": True}
        settings |= {
            "gradient_accumulation_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = relllm.ReLLMSFTTrainer(
            model=tiny_model(lora={"r": 4}),
            args=relllm.ReLLMSFTConfig(**settings),
            train_dataset=Dataset.from_list([row]),
            processing_class=processor,
        )
        batches = iter(trainer.get_train_dataloader())
        trainer.train()
        print("training step", count_hops(lambda: trainer.training_step(trainer.model, next(batches), 1)))


if __name__ == "__main__":
    main()
