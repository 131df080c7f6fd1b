"""What can go wrong, by whose doing: the command line maps each kind to an exit code."""


class InputError(ValueError):
    """What the user gave cannot be used; nothing has started and nothing was written (exit 2)."""


class WorkError(RuntimeError):
    """The work failed after it had started (exit 1)."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
