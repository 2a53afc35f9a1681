"""The one exception that stands for a user's mistake."""


class CocoaError(Exception):
    """A mistake in a recipe, a data set, a path or a checkpoint.

    The message is one line that names the file, row or key, and the remedy. The command line prints
    it without a traceback and exits with status 2; every other exception is a bug of ours.
    """
