"""An embedding that stays on disk: a pass needs a few of its rows only.

V vocabulary, D hidden size.
"""

import torch
from torch import Tensor, nn

from moesaic.residency.file_reader import FileReader
from moesaic.safetensors_file import Extent


class StoredEmbedding(nn.Module):
    """tokens (...) int64 -> (..., D), each row read when a token needs it."""

    def __init__(self, extent: Extent, shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self._extent, self._shape, self._stored, self._dtype = extent, shape, stored, dtype
        self._reader = FileReader()
        self._reader.open(extent)

    @property
    def weight(self) -> Tensor:
        """(0, D): no row of it is in memory. Its type and device are those of the rows."""
        return torch.empty(0, self._shape[1], dtype=self._dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        ids, places = tokens.unique(return_inverse=True)
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self._shape[0]:
            wrong = int(ids[(ids < 0) | (ids >= self._shape[0])][0])
            raise IndexError(f"there is no token {wrong}; there are {self._shape[0]:,}")
        rows = torch.empty(len(ids), self._shape[1], dtype=self._stored)
        for row, number in zip(rows, ids.tolist(), strict=True):
            self._reader.read_into(self._extent.part(number, self._shape[0]), row.view(torch.uint8))
        return rows.to(self._dtype)[places]
