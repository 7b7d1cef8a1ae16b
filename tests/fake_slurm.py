"""`sbatch` and `scancel` that run job scripts in the background on this machine, as SLURM would on a node."""

from __future__ import annotations

from pathlib import Path

SBATCH = """#!/usr/bin/env bash
if grep -q '^#SBATCH -p closed' "$1"; then
  echo 'sbatch: error: invalid partition specified: closed' >&2
  exit 1
fi
cp "$1" "{folder}/script.$$"
setsid bash "{folder}/script.$$" >"{folder}/log.$$" 2>&1 </dev/null &
echo "$!" >>"{folder}/submitted"
echo "Submitted batch job $!"
"""

SCANCEL = """#!/usr/bin/env bash
echo "$1" >>"{folder}/cancelled"
kill -TERM -- "-$1"
"""


class FakeSlurm:
    """The two commands in `folder/bin`; job numbers are process groups."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
            (self.programs / name).write_text(text.format(folder=folder))
            (self.programs / name).chmod(0o755)

    @property
    def submitted(self) -> list[int]:
        """The numbers of the jobs that were submitted."""
        return self._numbers("submitted")

    @property
    def cancelled(self) -> list[int]:
        """The numbers of those that were cancelled."""
        return self._numbers("cancelled")

    @property
    def scripts(self) -> list[str]:
        """The jobs' scripts."""
        return [path.read_text() for path in sorted(self.folder.glob("script.*"))]

    def _numbers(self, name: str) -> list[int]:
        path = self.folder / name
        return sorted(map(int, path.read_text().split())) if path.exists() else []
