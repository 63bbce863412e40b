"""Compiles the native kernels beside their loader where a C compiler is; without one the package is whole, and slower.

The build of a wheel or an editable install calls the hook. `python hatch_build.py` compiles in place, for developers.
CC names another compiler, CFLAGS adds to its words; FIREFLYER_NATIVE=0 leaves the kernels out.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "src" / "fireflyer" / "numerics" / "native"
LIBRARY = NATIVE / "kernels.so"


class NativeBuildHook(BuildHookInterface):
    """hatchling's hook of a wheel: with the library it holds machine code, and its name says for which platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        problem = build() if os.environ.get("FIREFLYER_NATIVE") == "0" or not is_built() else None
        if problem:
            self.app.display_warning(f"without the native kernels (quantised models run slower): {problem}")
            return
        build_data["artifacts"].append("/" + LIBRARY.relative_to(ROOT).as_posix())
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def build() -> str | None:
    """Compiles the library; the reason where that cannot be, and then no library of older sources stays."""
    problem = compile_library()
    if problem and not is_built():
        LIBRARY.unlink(missing_ok=True)
    return problem


def compile_library() -> str | None:
    """The reason where it could not be compiled."""
    if os.environ.get("FIREFLYER_NATIVE") == "0":
        return "FIREFLYER_NATIVE=0 switches them off"
    if sys.platform not in ("linux", "darwin"):
        return f"they are not built on {sys.platform}"
    compiler = (
        shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    )
    if not compiler:
        return "no C compiler here (cc, gcc or clang; CC names another)"
    unfinished = LIBRARY.with_name(f"kernels-{os.getpid()}.so")  # a process that has the old one mapped keeps it whole
    words = [
        *compiler,
        *"-O3 -std=gnu11 -fPIC -shared -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra".split(),
        f'-DFF_SOURCES="{sources_hash()}"',
        *shlex.split(os.environ.get("CFLAGS", "")),
        *(str(path) for path in sorted(NATIVE.glob("*.c"))),
        *("-o", str(unfinished), "-lpthread", "-lm"),
        *(["-ldl", "-Wl,--no-undefined"] if sys.platform == "linux" else []),
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            return f"{compiler[0]} failed with exit code {done.returncode}: {first}"
        if done.stderr:
            sys.stderr.write(done.stderr)
        unfinished.replace(LIBRARY)
    except OSError as error:
        return f"{compiler[0]} could not run: {error}"
    finally:
        unfinished.unlink(missing_ok=True)
    return None


def is_built() -> bool:
    """Whether a library of these very sources is in place."""
    return LIBRARY.is_file() and sources_hash().encode() in LIBRARY.read_bytes()


def sources_hash() -> str:
    """What the loader compares, so that a library from other sources than those beside it is never called."""
    digest = hashlib.sha256()
    for path in sorted([*NATIVE.glob("*.c"), *NATIVE.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    if problem := build():
        sys.stderr.write(f"fireflyer: without the native kernels (quantised models run slower): {problem}\n")
