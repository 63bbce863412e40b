"""The exceptions a user meets, each told in one line: a mistake of theirs; a run that stopped; a rank that is gone."""


class UserError(ValueError):
    """A mistake the user can mend.

    The message is one line: what is wrong, the value seen, where it came from, how to mend it. The command line prints
    it and exits with 2.
    """


class Stopped(Exception):
    """A run was asked to stop and saved itself; the same command goes on from there (exit code 75)."""


class RankLost(Exception):
    """Another rank of the run ended, or stopped answering: this one can't go on (exit code 1)."""
