"""What the vision tower gave for a medium, kept for further questions about it."""

from collections import OrderedDict


class MediaCache:
    """
    Sets of visual tokens (`MediaItem.sets`) of the media that were asked about last, in host memory.

    Args:
        max_bytes: what they take at most; a medium that is larger is not kept.

    Attributes:
        num_bytes: what they take.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._media = OrderedDict()  # from key to sets, the last used at the end

    def get(self, key, device):
        """The sets of a medium on `device`; `None` where it is not there."""
        sets = self._media.get(key)
        if sets is None:
            return None
        self._media.move_to_end(key)
        return [_moved(signals, device) for signals in sets]

    def put(self, key, sets: list) -> None:
        """Keeps the sets of a medium; those that were not used for longest go."""
        size = _size(sets)
        if size > self.max_bytes or key in self._media:
            return
        self._media[key] = [_moved(signals, "cpu") for signals in sets]
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, oldest = self._media.popitem(last=False)
            self.num_bytes -= _size(oldest)

    def clear(self) -> None:
        self._media.clear()
        self.num_bytes = 0


def _moved(signals: dict, device) -> dict:
    # Views of a batch of views would keep, and count, the whole batch.
    return {name: values.to(device, copy=True) for name, values in signals.items()}


def _size(sets: list) -> int:
    return sum(values.numel() * values.element_size() for signals in sets for values in signals.values())
