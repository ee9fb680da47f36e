"""Lays out the common tests of the installed Transformers release, so that `tests/transformers/` can subclass them.

The source archive of each release carries `tests/test_modeling_common.py`, `test_processing_common.py`,
`test_configuration_common.py` and their helpers, which no wheel holds. This script downloads the archive with pip and
unpacks those files as a package `tests` below DESTINATION:

    python scripts/transformers_suite.py .cache/transformers-tests

What the common tests import and the archive leaves out is written beside them: the exporters' and the generation mixin
as empty classes (generation has tests of its own in this repository) and the values that every plain config accepts.
Nothing of what is laid out is committed.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

CONFIG_VALUES = """\
# Other than the defaults; `ConfigTester.check_config_arguments_init` passes them to each config that is not composite.
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["SomeModel"],
    "problem_type": "regression",
}
"""
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": CONFIG_VALUES,
    "utils/__init__.py": "",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}
NEEDED = ("test_modeling_common.py", "test_processing_common.py", "test_configuration_common.py")


def download_source_archive(release: str, folder: Path) -> Path:
    """Downloads the source archive of a Transformers release from the package index.

    Args:
        release (`str`): The version, as installed.
        folder (`Path`): An existing folder for the archive.

    Returns:
        `Path`: The archive, a `.tar.gz`.

    Raises:
        subprocess.CalledProcessError: pip could not download it; its own message is on standard error.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "--dest", str(folder), f"transformers=={release}"]
    subprocess.run(command, check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def lay_out(archive: Path, destination: Path) -> int:
    """Unpacks the test modules of a Transformers source archive as an importable package `tests`.

    Args:
        archive (`Path`): The source archive.
        destination (`Path`): Emptied, then holds `tests/` and `utils/`; put it on `sys.path`.

    Returns:
        `int`: The number of test modules.

    Raises:
        ValueError: The archive lacks one of the common tests.
    """
    shutil.rmtree(destination, ignore_errors=True)
    modules = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                content = tar.extractfile(member)
                if content is not None:
                    modules[f"tests/{parts[2]}"] = content.read()
    missing = [name for name in NEEDED if f"tests/{name}" not in modules]
    if missing:
        raise ValueError(f"Expected {', '.join(missing)} in {archive.name}, found {len(modules)} other test modules.")
    for name, text in STAND_INS.items():
        modules.setdefault(name, text.encode())
    for name, content in modules.items():
        path = destination / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sum(name.startswith("tests/test_") for name in modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="a folder of its own; emptied first")
    destination = parser.parse_args().destination
    release = version("transformers")
    with tempfile.TemporaryDirectory() as folder:
        count = lay_out(download_source_archive(release, Path(folder)), destination)
    print(f"Transformers {release}: {count} test modules in {destination / 'tests'}")


if __name__ == "__main__":
    main()
