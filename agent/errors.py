"""The driver's typed errors: each owns an exit code and says what was expected, what came, and what to do."""


class NightError(Exception):
    """Something the user must know; `python -m agent.loop` prints it as one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(NightError):
    """The command cannot mean anything here: wrong option, wrong folder, no repository."""

    exit_code = 2


class LockedError(NightError):
    """Another driver works on this night."""

    exit_code = 8


class JournalError(NightError):
    """The journal cannot be trusted: corruption in the middle, a foreign schema, an impossible order of events."""

    exit_code = 9


class DataError(NightError):
    """The harness itself failed (data, tokenizer, scorer), so that no candidate can be blamed for it."""

    exit_code = 10


class BaselineError(NightError):
    """The unchanged train file does not train or score; a night cannot start from it."""

    exit_code = 11


class AgentError(NightError):
    """The coding agent can't be asked, or a limit of the user's can't be held with it; nothing was trained."""

    exit_code = 12


class Stopped(Exception):
    """Control flow, not an error: the user asked to stop at once. Whatever was running is repeated on resume."""
