"""Writes into a built package which commit it was built from; all else is in pyproject.toml."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        command = ["git", "rev-parse", "--short=9", "HEAD"]
        try:
            commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # a source package, outside a clone
            return
        if not self.editable_mode:
            Path(self.build_lib, "alignkit", "COMMIT").write_text(commit.stdout)


setup(cmdclass={"build_py": BuildWithCommit})
