"""`python -m fireflyer.fleet shepherd FOLDER [RANK]` and `... validator FOLDER`: what a back end starts on a node."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if sys.argv[1] == "shepherd":
        from fireflyer.fleet.shepherd import main
    else:
        from fireflyer.fleet.validator import main
    sys.exit(main(sys.argv[2:]))
