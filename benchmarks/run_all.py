"""Every benchmark in a process of its own, then one table of what was to reach and what was reached.

    python benchmarks/run_all.py            all of them
    python benchmarks/run_all.py towers     some

A benchmark that fails does not stop the others; the exit status then is 1.
"""

import json
import subprocess
import sys
from pathlib import Path

from harness import RESULTS
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
SHARED = ("harness", "reference", "run_all")
ON_REQUEST = ("cheap_mode", "gpu", "profiles", "real_models")  # see their docstrings


def names() -> list[str]:
    """The benchmarks: every file here that is not shared by them, nor run on request only."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED + ON_REQUEST)


def main(chosen: list[str]) -> int:
    unknown = sorted(set(chosen) - set(names()))
    if unknown:
        print(f"No such benchmark: {', '.join(unknown)}. There are: {', '.join(names())}.", file=sys.stderr)
        return 2
    chosen = chosen or names()
    failed = [name for name in chosen if subprocess.run([sys.executable, str(FOLDER / f"{name}.py")]).returncode]
    print_summary([name for name in chosen if name not in failed])
    for name in failed:
        print(f"{name} failed; `python benchmarks/{name}.py` shows why.", file=sys.stderr)
    return 1 if failed else 0


def print_summary(chosen: list[str]) -> None:
    """One table of the figures with a goal, from `results/`, with the load average at the end of each."""
    table = Table("benchmark", "what", "to reach", "reached", "met", "threads", "load")
    environment: dict[str, object] = {}
    for name in chosen:
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        environment = content["environment"]
        run = str(environment["torch_threads"]), f"{environment['load_average']:.1f}"
        for row in content["rows"]:
            if row.get("to reach"):
                reached = f"{row['reached']:.3g}"
                table.add_row(name, row["what"], row["to reach"], reached, row["met"], *run)
    Console(width=140).print(table)
    if environment:
        versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
        print(f"{environment['cpu']}, {environment['cores']} cores, device {environment['device']}; {versions}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
