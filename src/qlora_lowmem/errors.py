"""What a person is told when something is wrong, and the exit code that a script reads.

Exit codes: 0 done, 1 a failure of ours, 2 usage, configuration or data, 3 out of GPU memory or does not fit,
130 interrupted, 143 ended by SIGTERM.
"""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 130


class QloraLowmemError(Exception):
    """A condition that the user is told in one message, without a traceback."""

    exit_code = EXIT_FAILURE


class UsageError(QloraLowmemError):
    """A recipe, a data file, a command line or an environment that cannot work as it is.

    The message names the field, the value, what is allowed and what to do.
    """

    exit_code = EXIT_USAGE


class DoesNotFitError(QloraLowmemError):
    """The job needs more GPU memory than there is."""

    exit_code = EXIT_DOES_NOT_FIT


class StoppedBySignal(KeyboardInterrupt):
    """A signal ended a run between two steps. The message says where it stands, `exit_code` is 128 + the signal's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
