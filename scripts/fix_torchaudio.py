"""Makes torchaudio importable beside a CPU-only PyTorch. `make setup` runs this; running it again changes nothing.

torchaudio's wheel is published with CUDA only: beside a CPU-only PyTorch its import loads its compiled libraries and
raises `OSError: libc10_cuda.so`. Without those files torchaudio takes its Python paths (resampling, transforms), the
only ones this package uses. Beside a PyTorch with CUDA nothing is touched.
"""

from importlib.util import find_spec
from pathlib import Path

import torch


def remove_compiled_libraries(package: Path) -> list[str]:
    """Deletes the shared libraries of an installed torchaudio.

    Args:
        package (`Path`): The folder of the installed package, with its libraries in `lib/`.

    Returns:
        `list[str]`: The names of the files that were deleted; empty if there were none.
    """
    libraries = sorted((package / "lib").glob("*.so"))
    for library in libraries:
        library.unlink()
    return [library.name for library in libraries]


def main() -> None:
    if torch.version.cuda is not None:
        return
    spec = find_spec("torchaudio")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("Expected torchaudio beside PyTorch, found none. Run `make setup` first.")
    removed = remove_compiled_libraries(Path(spec.origin).parent)
    if removed:
        print(f"CPU-only PyTorch {torch.__version__}: removed torchaudio's CUDA libraries ({', '.join(removed)})")


if __name__ == "__main__":
    main()
