"""The two exceptions a user meets: a mistake of theirs, told in one line; a run that stopped and saved itself."""


class UserError(ValueError):
    """A mistake the user can mend.

    The message is one line: what is wrong, the value seen, where it came from, how to mend it. The command line prints
    it and exits with 2.
    """


class Stopped(Exception):
    """A run was asked to stop and saved itself; the same command goes on from there (exit code 75)."""
