"""Text under LANG=C, where Python's default encoding is ASCII; any file opened without naming its encoding fails."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, pathlib
from fireflyer.data.held_out import held_out_rows
from fireflyer.data.loader import Loader
from fireflyer.data.mixture import open_sources
from fireflyer.text.tokenizer import Tokenizer
folder = pathlib.Path(sys.argv[1])
mixture = open_sources([str(folder / "data")], held_out=0.2)
tokenizer = Tokenizer.train(mixture.sample_texts(0), 300)
tokenizer.save(folder)
tokenizer = Tokenizer.from_file(folder)
ids = Loader(mixture, tokenizer, seq_len=64, seed=0).next_batch(8).input_ids_BT.flatten().tolist()
held_out_rows(mixture, tokenizer, 16, 4)
sys.stdout.buffer.write(tokenizer.decode(ids).encode("utf-8"))
"""


def test_text_is_read_and_written_as_utf8_whatever_the_locale(folder) -> None:
    path = folder({"größe.txt": "Größe 中文 🙂 " * 50, "b.jsonl": '{"text": "naïve"}\n' * 3})
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    environment |= {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    strict = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning:fireflyer"]
    command = [sys.executable, *strict, "-c", SCRIPT, str(path.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode("utf-8")
    assert "Größe 中文 🙂 " in text
    assert "naïve" in text
