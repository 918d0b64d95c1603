"""A part of a file, as a file: the members of shards."""

import io


class Window(io.RawIOBase):
    """A part of a file, as a file.

    Args:
        path: the file.
        offset: where the part begins, in bytes.
        length: how long it is; None: to the end of the file.
    """

    def __init__(self, path: str, offset: int = 0, length: int | None = None) -> None:
        super().__init__()
        self._file = open(path, "rb")  # noqa: SIM115
        self._start = offset
        self._length = self._file.seek(0, io.SEEK_END) - offset if length is None else length
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place in the part."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; a place before the beginning is the beginning."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: object) -> int:
        """Fill the buffer as far as the part goes."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(view), self._length - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file too."""
        if not self.closed:
            self._file.close()
        super().close()
