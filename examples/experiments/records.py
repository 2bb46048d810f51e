"""Every finished run is one line of JSON; a crash loses at most the run in progress."""

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from trainer.errors import TrainerError
from trainer.metrics import without_nan

Record = dict[str, Any]


class Records:
    """The finished runs of a study, in a folder.

    Every process appends to a file of its own or to a common one, `runs.jsonl`; all files `runs*.jsonl` are read, so that
    machines that share no file system can each fill a file and be brought together by copying.

    Args:
        folder: created if it does not exist.
        name: what follows `runs` in the name of the file that is written to.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / f"runs{name}.jsonl"

    def read(self) -> dict[str, Record]:
        """Give the records by their `key`.

        Raises:
            TrainerError: a line in the middle of a file is no JSON.
        """
        found: dict[str, Record] = {}
        for path in sorted(self.folder.glob("runs*.jsonl")):
            for record in _parse(path):
                found.setdefault(record["key"], record)
        return found

    def append(self, record: Record) -> None:
        """Add a record, on disk when this returns."""
        line = json.dumps(without_nan(record), allow_nan=False).encode() + b"\n"
        with FileLock(self.path.with_suffix(".lock")), self.path.open("ab+") as file:
            file.truncate(_end_of_whole_lines(self.path.read_bytes()))
            # One write to the end of the file: a reader sees all of the line or, after a crash, a part without its end.
            os.write(file.fileno(), line)
            os.fsync(file.fileno())


def _end_of_whole_lines(content: bytes) -> int:
    # A process that was killed while it wrote leaves a line without its end; its run counts as not finished.
    return content.rfind(b"\n") + 1


def _parse(path: Path) -> list[Record]:
    content = path.read_bytes()
    lines = content[: _end_of_whole_lines(content)].splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise TrainerError(
                f"{path}, line {number}, is no JSON: {error}. Take the line out; its run is done again."
            ) from error
    return records
