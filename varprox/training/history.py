"""The columns of numbers that a run leaves behind."""

from collections.abc import Mapping

import numpy as np


class History:
    """A table that grows by rows; an entry that its row does not name is NaN.

    Appending takes the same time however long the table is.
    """

    def __init__(self, columns: Mapping[str, np.ndarray] | None = None) -> None:
        self._length = max(map(len, (columns or {}).values()), default=0)
        self._columns: dict[str, np.ndarray] = {}
        self._capacity = max(16, self._length)
        for name, values in (columns or {}).items():
            self._column(name)[: self._length] = values

    def __len__(self) -> int:
        return self._length

    def append(self, row: Mapping[str, float]) -> None:
        """Adds a row."""
        if self._length == self._capacity:
            self._columns = {
                name: np.concatenate([values, np.full(self._capacity, np.nan)])
                for name, values in self._columns.items()
            }
            self._capacity *= 2
        self._length += 1
        self.update(row)

    def update(self, row: Mapping[str, float]) -> None:
        """Changes entries of the last row."""
        for name, value in row.items():
            self._column(name)[self._length - 1] = value

    def last(self) -> dict[str, float]:
        """The last row."""
        return {name: float(values[self._length - 1]) for name, values in self._columns.items()}

    def columns(self) -> dict[str, np.ndarray]:
        """The columns so far, read-only and not copied: rows that are added later do not show."""
        views = {name: values[: self._length].view() for name, values in self._columns.items()}
        for view in views.values():
            view.flags.writeable = False
        return views

    def _column(self, name):
        if name not in self._columns:
            self._columns[name] = np.full(self._capacity, np.nan)
        return self._columns[name]
