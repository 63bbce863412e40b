"""builtin:stdlib: the source of the running Python's own standard library.

Real code and English on every machine, without a download. The same Python gives the same documents.
"""

import os
import sysconfig
from pathlib import Path

from fireflyer.data.documents import FileDocuments
from fireflyer.data.files import ReadOptions
from fireflyer.errors import UserError

STDLIB = "builtin:stdlib"

# What is installed beside the library, and tests: their files differ from one system to the next, and many of them are
# tables or broken on purpose.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_documents() -> FileDocuments:
    """Every .py file of the standard library in UTF-8. Raises UserError on a Python that ships none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"{STDLIB}: this Python has no library source in {root}; give a folder of your own text")
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    return FileDocuments(STDLIB, files, ReadOptions(), skip_invalid=True)
