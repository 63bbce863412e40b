"""The script behind every number that the docs print.

A proof is one module here, `benchmarks/<part>.py`, with `main() -> Proof` (see `_result.py`). `make proof PART=<part>`
runs it, writes `results/<part>.json` beside commit, machine and figures, and rewrites the marked blocks of the docs
from all results (`_tables.py`). Modules whose name begins with an underscore are the harness.
"""
