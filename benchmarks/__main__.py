"""`python -m benchmarks [PART...]`: runs the named proofs, or all, then rewrites the docs' blocks from the results."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks._result import ROOT, Proof, write_result
from benchmarks._tables import rewrite_all


def parts() -> list[str]:
    """The proofs there are, by name: the module's, with dashes."""
    return sorted(
        path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all ran and met their targets. 1: one failed or missed a target. 2: no such part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of: {', '.join(parts())}")
    parser.add_argument("--tables", action="store_true", help="only rewrite the docs from the results there are")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.parts) - set(parts())):
        print(f"no proof '{unknown[0]}'; there are: {', '.join(parts())}", file=sys.stderr)
        return 2
    if options.here:
        return _run_here(options.parts[0])
    failed = [] if options.tables else [part for part in options.parts or parts() if _run_aside(part)]
    changed, lacking = rewrite_all()
    for path in changed:
        print(f"rewrote {path.relative_to(ROOT)}")
    for line in lacking:
        print(line, file=sys.stderr)
    if failed:
        print(f"failed or missed a target: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or lacking else 0


def _run_aside(part: str) -> int:
    # A process each: memory and thread settings of one proof never colour the next.
    return subprocess.run([sys.executable, "-m", "benchmarks", "--here", part], cwd=ROOT, check=False).returncode


def _run_here(part: str) -> int:
    print(f"== {part}", flush=True)
    began = time.perf_counter()
    module = part.replace("-", "_")
    proof = import_module(f"benchmarks.{module}").main()
    if not isinstance(proof, Proof):
        raise TypeError(f"benchmarks/{module}.py: main() must return a Proof, got {type(proof).__name__}")
    path = write_result(part, proof, time.perf_counter() - began)
    print(f"wrote {path.relative_to(ROOT)}")
    for line in proof.missed:
        print(f"target missed: {line}", file=sys.stderr)
    return 1 if proof.missed else 0


if __name__ == "__main__":
    sys.exit(main())
