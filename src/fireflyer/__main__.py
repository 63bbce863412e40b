"""`python -m fireflyer`, and `torchrun -m fireflyer`."""

import sys

from fireflyer.cli.main import main

sys.exit(main())
