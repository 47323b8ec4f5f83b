"""`moesaic bench`: run a script of benchmarks/."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moesaic.errors import UsageError

_BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
_HELPERS = ("common", "communication_ranks", "hosts")


def bench(
    name: str = "",
    /,
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> int:
    """Run the benchmark NAME with its own flags; --quick and --json work with all of them.

    Parameters
    ----------
    name
        A script of benchmarks/ in the source checkout; without a name they are listed.
    """
    scripts = {path.stem: path for path in sorted(_BENCHMARKS.glob("*.py")) if path.stem not in _HELPERS}
    if not scripts:
        raise UsageError("benchmarks are part of the source checkout; install moesaic from one with pip install -e .")
    if name not in scripts:
        unknown = f"unknown benchmark '{name}'" if name else "name a benchmark"
        raise UsageError(f"{unknown}; there are {', '.join(scripts)}")
    return subprocess.run([sys.executable, scripts[name], *flags]).returncode
