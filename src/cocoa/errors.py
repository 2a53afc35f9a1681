"""The one exception that stands for a user's mistake."""

LONGEST_MESSAGE = 2000
_TRACEBACK = "\nOriginal Traceback (most recent call last):\n"


class CocoaError(Exception):
    """A mistake in a recipe, a data set, a path or a checkpoint.

    The message is one line that names the file, row or key, and the remedy. The command line prints
    it without a traceback and exits with status 2; every other exception is a bug of ours.

    Example:
        >>> import cocoa
        >>> try:
        ...     cocoa.read_pairs("none.jsonl")
        ... except cocoa.CocoaError as error:
        ...     print(error)
        data.train: none.jsonl: no such file or folder
    """

    def __init__(self, message: str) -> None:
        if _TRACEBACK in message:  # raised in a data loader's worker, and put so by torch
            message = message.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(one_line(message))


class ImageError(CocoaError):
    """An image that is missing or cannot be read; the message's remedy is that of a data set."""

    @property
    def fault(self) -> str:
        """What is wrong, without the remedy."""
        return str(self).rpartition("; ")[0]


def one_line(message: str) -> str:
    """A message that quotes input, fit to be printed: no control characters, the middle of a very long one left out."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[5 - LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in message)


def first_line(error: Exception) -> str:
    """Of an error's message, which may have none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
