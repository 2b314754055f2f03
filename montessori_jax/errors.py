"""The one exception that users see as a single line."""


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do.

    The command line prints it as ``montessori: error: ...`` and exits with status 2; library
    callers catch it like any other exception.
    """


class Interrupted(Exception):
    """A stop was asked for and what was computed is saved: the same command goes on from there."""
