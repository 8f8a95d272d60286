"""The cpu backend: one call of the native library (`lmc.cpu`) a transfer, the GIL released."""

from lmc import cpu
from lmc.transfer.pages import Transfer

__all__ = ["CpuBackend"]


class CpuBackend:
    name = "cpu"

    def __init__(self, path: cpu.CopyPath = cpu.CopyPath.BEST) -> None:
        """Raises OSError where there is no library."""
        self._pages = cpu.Pages(path)

    def gather(self, transfer: Transfer, planes: range) -> None:
        self._pages.gather(transfer.pool.table, planes, transfer.table, *_ids(transfer))

    def scatter(self, transfer: Transfer, planes: range) -> None:
        self._pages.scatter(transfer.pool.table, planes, transfer.table, *_ids(transfer))


def _ids(transfer: Transfer) -> tuple[int, int]:
    return transfer.page_ids.data_ptr(), len(transfer.page_ids)
