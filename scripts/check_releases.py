"""Run tests with the lowest releases that pyproject.toml allows, with the pinned ones, and with the newest there are.

    make check-releases                                    the rooms that lean on Transformers, in three environments
    make check-releases ARGS="newest tests/modeling"       one environment, some tests

`pinned` is `.venv`; the two others are virtual environments in `.cache/releases/` that have releases of their own of
`PACKAGES` and take everything else from `.venv`.
"""

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
RELEASES = ("lowest", "pinned", "newest")
PACKAGES = ("transformers", "trl", "peft", "accelerate")  # each reaches into the others
TESTS = [f"tests/{room}" for room in ("modeling", "processing", "inference", "training")]


def allowed() -> list[Requirement]:
    """Return what the package requires of `PACKAGES` on this Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["train"]])
    return [one for one in every if one.name in PACKAGES and (one.marker is None or one.marker.evaluate())]


def lowest(requirement: Requirement) -> str:
    """Return a requirement that only the lowest allowed release meets."""
    bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"pyproject.toml must give {requirement.name} one lower bound (>=), got {requirement}.")
    return f"{requirement.name}=={bounds[0]}"


def make_environment(release: str) -> Path:
    """Make or update an environment; return its interpreter."""
    folder = ROOT / ".cache" / "releases" / release
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, clear=True)
        own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        shared = sysconfig.get_path("purelib")
        (own / "project.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    wanted = [f"{one.name}{one.specifier}" if release == "newest" else lowest(one) for one in allowed()]
    wanted += ["requests"] if release == "lowest" else []  # of `transformers serve` before 5.19
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--upgrade", *wanted], check=True)
    return python


def main() -> int:
    """Run the tests in each environment; return 1 if some failed in any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", help="of lowest, pinned and newest (all), and arguments of pytest")
    given, options = parser.parse_known_args()
    releases = [one for one in given.releases if one in RELEASES] or RELEASES
    tests = [one for one in given.releases if one not in RELEASES] or TESTS
    failed = []
    for release in releases:
        python = sys.executable if release == "pinned" else str(make_environment(release))
        versions = "; ".join(f"print({name!r}, version({name!r}))" for name in PACKAGES)
        print(f"--- {release}", flush=True)
        subprocess.run([python, "-c", f"from importlib.metadata import version; {versions}"], check=True)
        if subprocess.run([python, "-m", "pytest", "-q", *tests, *options], cwd=ROOT).returncode:
            failed.append(release)
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(releases)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
