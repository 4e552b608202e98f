"""Findings in plain words, computed from the figures of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from prefault.bench import published
from prefault.bench.grid import PREFAULT, Cell, Sharing
from prefault.bench.results import BenchRun, CellResult, Status
from prefault.sizes import MIB

_MOST = 4


def findings(run: BenchRun) -> list[str]:
    """Return up to four sentences on the largest mappings that were measured, the most useful first."""
    found = _Findings(run.results)
    sentences = list(found.sentences())[:_MOST]
    if len(sentences) < 2:
        sentences += list(found.extremes())[: 2 - len(sentences)]
    return sentences


class _Findings:
    def __init__(self, results: tuple[CellResult, ...]) -> None:
        measured = [result for result in results if result.status is Status.MEASURED]
        self._results: Mapping[Cell, CellResult] = {result.cell: result for result in measured}
        self._size = max((result.cell.size_bytes for result in measured), default=0)

    def sentences(self) -> Iterator[str]:
        yield from self._populate_instead_of_writing()
        yield from self._allocate_first()
        yield from self._files_without_dirt()
        yield from self._huge_pages()

    def extremes(self) -> Iterator[str]:
        """Name the fastest and the slowest method of each group: always true, seldom the most useful."""
        groups = dict.fromkeys(cell.group for cell in self._results)
        for group in groups:
            timed = sorted((self._best(cell), cell.method) for cell in self._results if cell.group == group)
            if len(timed) > 1 and timed[-1][0] > 1.05 * timed[0][0] > 0:
                (fast, fastest), (slow, slowest) = timed[0], timed[-1]
                yield f"{group}: {fastest} was the fastest and {slowest} took {slow / fast:.1f} times as long."

    def _populate_instead_of_writing(self) -> Iterator[str]:
        cell = self._cell("private", "Anon 4 KiB", "populate_write")
        ratio = self._ratio(cell, replace(cell, method="write"))
        if ratio:
            yield (
                f"Private anonymous memory: populate_write took {ratio:.2f}x the time of writing each page by hand"
                f"{self._published(cell, 'write')}."
            )

    def _allocate_first(self) -> Iterator[str]:
        for backing in ("Memfd 4 KiB", "tmpfs"):
            cell = self._cell("shared", backing, "fallocate+populate_write")
            ratio = self._ratio(cell, replace(cell, method="populate_write"))
            if ratio:
                verdict = "gained time" if ratio < 0.97 else "cost time" if ratio > 1.03 else "made no difference"
                yield (
                    f"Shared {backing}: fallocate before populate_write {verdict}, {ratio:.2f}x of populate_write alone"
                    f"{self._published(cell, 'populate_write')}."
                )
                return

    def _files_without_dirt(self) -> Iterator[str]:
        cell = self._cell("shared", "file", "fallocate+populate_read")
        ratio = self._ratio(cell, replace(cell, method="populate_write"))
        if ratio:
            yield (
                f"Shared file: fallocate+populate_read, which leaves nothing to write back, took {ratio:.2f}x the time of"
                f" populate_write{self._published(cell, 'populate_write')}."
            )

    def _huge_pages(self) -> Iterator[str]:
        huge = self._cell("private", "Anon THP", "populate_write")
        small = replace(huge, backing="Anon 4 KiB")
        ratio = self._ratio(huge, small)
        if not ratio:
            return
        sentence = f"With transparent huge pages populate_write took {ratio:.2f}x its time with 4 KiB pages"
        call = replace(huge, method=PREFAULT)
        ratio = self._ratio(call, small)
        if ratio:
            note = self._results[call].note
            sentence += f", and prefault.populate() {ratio:.2f}x" + (f" ({note})" if note else "")
        yield sentence + "."

    def _cell(self, sharing: Sharing, backing: str, method: str) -> Cell:
        return Cell(self._size, sharing, backing, method)

    def _best(self, cell: Cell) -> int:
        return min(self._results[cell].values_ns)

    def _ratio(self, cell: Cell, reference: Cell) -> float | None:
        """Return the time of one cell over that of another; None unless both were measured."""
        if cell not in self._results or reference not in self._results:
            return None
        return self._best(cell) / self._best(reference)

    def _published(self, cell: Cell, method: str) -> str:
        mine, reference = published.reference_ms(cell), published.reference_ms(replace(cell, method=method))
        if mine is None or reference is None:
            return ""
        size = published.reference_size(cell.size_bytes)
        of_size = "" if size == cell.size_bytes else f" for {size // MIB} MiB"
        return f" (published{of_size}: {mine / reference:.2f}x)"
