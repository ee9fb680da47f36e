"""`import relllm` against the import of the Auto classes, with which it registers, and the help of the command."""

import resource
import statistics
import subprocess
import sys

from harness import figure, report

STATEMENTS = {
    "transformers": ("-c", "from transformers import AutoModel, AutoProcessor"),
    "relllm": ("-c", "import relllm"),
    "trainer": ("-c", "from relllm import ReLLMSFTTrainer"),
    "help": ("-m", "relllm.cli", "--help"),
}


def main(*, quick: bool = False) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(1 if quick else 5):
        for name, arguments in STATEMENTS.items():
            seconds[name].append(_processor_time(arguments))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plus = medians["relllm"] - medians["transformers"]
    rows = [
        figure("import relllm, s more than the Auto classes", plus, "<= 0.5", seconds=medians["relllm"]),
        figure("relllm --help: s", medians["help"], "<= 1", seconds=medians["help"]),
        figure("from relllm import ReLLMSFTTrainer: s", medians["trainer"], seconds=medians["trainer"]),
    ]
    report("imports", rows, about="processor time of a fresh interpreter; its bytecode is cached")


def _processor_time(arguments: tuple[str, ...]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
