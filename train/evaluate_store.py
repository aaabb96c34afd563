"""What an evaluation has finished, on the disk: a killed run loses a batch at most."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from samlight_jax.errors import InputError

NAME = "partial.jsonl"


class Store:
    """Appends finished batches to `folder`/partial.jsonl, whose first line says what they are of.

    Args:
      folder: of the report.
      header: whatever decides the numbers; a file with another one is not continued.
      overwrite: begin anew instead of refusing.

    Raises:
      InputError: the file holds another evaluation.
    """

    def __init__(self, folder: Path, header: dict[str, Any], *, overwrite: bool = False):
        self.path = folder / NAME
        self.finished: set[str] = set()
        header = json.loads(json.dumps(header))
        folder.mkdir(parents=True, exist_ok=True)
        found, length = self._whole_lines()
        if found and not overwrite:
            self._refuse_other(found[0], header)
            os.truncate(self.path, length)  # a line that was being written is no line
            self.finished = {record["photo"] for line in found[1:] for record in line}
        else:
            self.path.write_text("")
            self._append(header)

    def _whole_lines(self) -> tuple[list[Any], int]:
        """The lines that were written whole, and the bytes that they take."""
        if not self.path.exists():
            return [], 0
        lines, length = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                lines.pop()
                break
            length += len(line)
        return lines, length

    def _refuse_other(self, found: Any, header: dict[str, Any]) -> None:
        if found == header:
            return
        known = found if isinstance(found, dict) else {}
        names = sorted(key for key in header if known.get(key) != header[key])
        raise InputError(
            f"{self.path.parent} holds another evaluation (other {', '.join(names)}); choose "
            "another --out, or add --overwrite to start anew."
        )

    def add(self, records: list[dict[str, Any]]) -> None:
        """Appends a finished batch; it is on the disk when this returns."""
        self._append(records)
        self.finished |= {record["photo"] for record in records}

    def _append(self, value: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> dict[str, dict[str, Any]]:
        """All records by photograph."""
        lines, _ = self._whole_lines()
        return {record["photo"]: record for line in lines[1:] for record in line}
