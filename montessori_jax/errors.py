"""The exceptions that users see as a single line."""

import errno


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do.

    The command line prints it as ``montessori: error: ...`` and exits with its status; library
    callers catch it like any other exception.
    """

    status = 2


class Passing(UserError):
    """Something around us failed for now: the same command, started again, may well go on.

    Its status is the system's EX_TEMPFAIL, by which launchers know that trying again may help.
    """

    status = 75


class LostProcess(Passing):
    """Another process of the job has gone or does not answer."""


# Of a network, a mount or a disk that may be back soon; a full disk or a missing file will not.
PASSING = frozenset(
    [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
     errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EPIPE]
)  # fmt: skip


def status_of(error: BaseException) -> int:
    """What a command ends with that fails by ``error``: 2 where the user can mend it, 75 where
    trying again may help, else 1."""
    if isinstance(error, UserError):
        return error.status
    if isinstance(error, OSError):
        passing = error.errno in PASSING or isinstance(error, TimeoutError | ConnectionError)
        return Passing.status if passing else UserError.status
    return 1


class Interrupted(Exception):
    """A stop was asked for and what was computed is saved: the same command goes on from there."""
