"""The errors a user of the data layer can act on."""


class DataError(ValueError):
    """Bad input or damaged data: one line naming the file or key, the numbers and the fix."""


class DamagedDocument(DataError):
    """Bytes of one document are not those that the index describes.

    Attributes:
        document: its number in the store.
        shard: the path or URL of its shard.
        key: its key in the shard.
    """

    def __init__(self, message: str, *, document: int, shard: str, key: str) -> None:
        super().__init__(message)
        self.document, self.shard, self.key = document, shard, key

    def __reduce__(self) -> tuple[object, ...]:
        # Also crosses to another process whole.
        return _rebuild, (str(self), self.document, self.shard, self.key)


def _rebuild(message: str, document: int, shard: str, key: str) -> DamagedDocument:
    return DamagedDocument(message, document=document, shard=shard, key=key)
