"""Index of intervals that may overlap: it finds those that overlap a given one, whatever their number."""

from __future__ import annotations

from typing import Generic, TypeVar

Item = TypeVar("Item")


class IntervalIndex(Generic[Item]):
    """Half-open intervals ``[start, stop)`` of numbers, not empty, each with a hashable item.

    Adding and removing take constant time, and a query takes time by its results: there is a dict for each power of two, of
    the intervals that are longer than half of it, and at most as long. An interval is filed there under its start divided by
    that power, so that one that overlaps a query is filed within the query or one place before.

    A thread may ask without a lock while another one adds or removes.
    """

    def __init__(self) -> None:
        # An entry alone in its place, as most are, or all entries of the place: a dict for each would take twice the memory.
        self._levels: dict[int, dict[int, _Entry[Item] | dict[_Entry[Item], None]]] = {}

    def add(self, start: int, stop: int, item: Item) -> None:
        """Add an interval with its item."""
        level = (stop - start - 1).bit_length()
        places = self._levels.setdefault(level, {})
        entry = (start, stop, item)
        place = places.setdefault(start >> level, entry)
        if isinstance(place, dict):
            place[entry] = None
        elif place is not entry:
            places[start >> level] = {place: None, entry: None}

    def remove(self, start: int, stop: int, item: Item) -> None:
        """Remove an interval; KeyError if it was not added with this item."""
        level = (stop - start - 1).bit_length()
        places = self._levels.get(level, {})
        place = places[start >> level]
        if isinstance(place, dict):
            del place[start, stop, item]
            if not place:
                del places[start >> level]
        elif place == (start, stop, item):
            del places[start >> level]
        else:
            raise KeyError((start, stop, item))

    def at(self, number: int) -> Item | None:
        """Return the item of an interval that a number lies in, or None: in fewer steps than :meth:`overlapping`."""
        for level, places in tuple(self._levels.items()):
            here = number >> level
            for place in (places.get(here), places.get(here - 1)):
                if place is not None:
                    for start, stop, item in tuple(place) if isinstance(place, dict) else (place,):
                        if start <= number < stop:
                            return item
        return None

    def overlapping(self, start: int, stop: int) -> list[tuple[int, int, Item]]:
        """Return the intervals that overlap ``[start, stop)``, each with its item, in no order."""
        found: list[tuple[int, int, Item]] = []
        for level, places in tuple(self._levels.items()):
            first, last = (start >> level) - 1, (stop - 1) >> level
            if last - first < len(places):
                near = [place for number in range(first, last + 1) if (place := places.get(number))]
            else:
                near = list(places.values())
            for place in near:
                if isinstance(place, dict):
                    found += [entry for entry in tuple(place) if entry[0] < stop and start < entry[1]]
                elif place[0] < stop and start < place[1]:
                    found.append(place)
        return found


_Entry = tuple[int, int, Item]
