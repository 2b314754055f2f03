"""The exceptions that users see as a single line."""


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do.

    The command line prints it as ``montessori: error: ...`` and exits with its status; library
    callers catch it like any other exception.
    """

    status = 2


class LostProcess(UserError):
    """Another process of the job has gone or does not answer: the same job, started again, goes on.

    Its status is the system's EX_TEMPFAIL, by which launchers know that trying again may help.
    """

    status = 75


class Interrupted(Exception):
    """A stop was asked for and what was computed is saved: the same command goes on from there."""
