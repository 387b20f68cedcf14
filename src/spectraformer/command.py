"""The installed program: the command line, or what to install for it."""

from __future__ import annotations

import sys

EXTRA = ("tyro", "rich", "numpy", "pyarrow", "PIL", "safetensors", "matplotlib", "jinja2", "scipy", "tensorboard")


def main() -> None:
    """Runs the command line; without its packages, says how to get them."""
    try:
        from spectraformer.cli import main as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.stderr.write(
            f"error: the command line needs {package}, which is not installed; pip install 'spectraformer[lra]'\n"
        )
        sys.exit(1)
    sys.exit(run())
