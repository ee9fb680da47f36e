"""`import relllm` against `import transformers`, each in a fresh process, and which heavy packages it loads."""

import resource
import statistics
import subprocess
import sys

from harness import figure, report

HEAVY = ("torch", "peft", "trl", "datasets", "sklearn", "scipy", "matplotlib", "torchaudio", "soundfile")
STATEMENTS = {
    "transformers": "import transformers",
    "relllm": "import relllm",
    "processor": "from relllm import ReLLMProcessor",
    "model": "from relllm import ReLLMForConditionalGeneration",
    "trainer": "from relllm import ReLLMSFTTrainer",
}

COMPARED = ("transformers", "relllm")  # in turn; the others run once, for orientation


def main(*, quick: bool = False) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for round_number in range(1 if quick else 5):
        for name, statement in STATEMENTS.items():
            if name in COMPARED or round_number == 0:
                seconds[name].append(_processor_time(statement))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plus = medians["relllm"] - medians["transformers"]
    loaded = f"{STATEMENTS['relllm']}, sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    heavy = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    rows = [figure("import relllm, s more than import transformers", plus, "<= 0.2", seconds=medians["relllm"])]
    rows.append(
        figure("heavy packages that import relllm loads", float(len(heavy)), "<= 0", seconds=medians["relllm"])
    )
    for name in ("processor", "model", "trainer"):
        rows.append(figure(f"{STATEMENTS[name]}: s", medians[name], seconds=medians[name]))
    report("imports", rows, about="processor time of a fresh interpreter; its bytecode is cached")


def _processor_time(statement: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
