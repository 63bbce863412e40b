"""The fleet's state folder: who may enter which part of it, and the lock that keeps a second controller out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fireflyer.checkpoint.run_folder import FileLock
from fireflyer.errors import UserError

VARIABLE = "FIREFLYER_FLEET"


def default_folder() -> Path:
    """$FIREFLYER_FLEET; else root's is the machine's, and anybody else's their own."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/fireflyer/fleet")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fireflyer" / "fleet"


@dataclass(frozen=True)
class StateFolder:
    """Paths in it. Shared (root's, for all users): others may pass through to the socket and to their own attempts."""

    root: Path

    @property
    def ledger(self) -> Path:
        return self.root / "ledger" / "fleet.db"

    @property
    def socket(self) -> Path:
        return self.root / "fleet.sock"

    @property
    def log(self) -> Path:
        return self.root / "ledger" / "controller.log"

    @property
    def lock(self) -> Path:
        return self.root / "ledger" / "controller.lock"

    def attempt(self, fleet: str, number: int) -> Path:
        """`fleet`: the ledger's own id, so that a new ledger in an old folder does not meet old attempts."""
        return self.root / "attempts" / f"{fleet}-{number}"

    def prepare(self, shared: bool) -> None:
        """Make what is missing, with the rights that belong to it."""
        passage = 0o711 if shared else 0o700
        try:
            for path, mode in ((self.root, passage), (self.ledger.parent, 0o700), (self.root / "attempts", passage)):
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(mode)
        except OSError as error:
            raise UserError(
                f"the fleet's folder {self.root} can't be used: {error.strerror}; give another with --state"
            ) from error


class ControllerLock(FileLock):
    """Held by the one controller of a state folder."""

    def __init__(self, folder: StateFolder) -> None:
        super().__init__(
            folder.lock,
            f"{folder.root} has a controller already ({{holder}}): use it, or end it with fireflyer fleet down",
        )
