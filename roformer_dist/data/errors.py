"""The error a user of the data layer can act on."""


class DataError(ValueError):
    """Bad input or damaged data: one line naming the file or key, the numbers and the fix."""
