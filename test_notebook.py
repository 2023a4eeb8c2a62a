"""dreamer.py as a notebook: convert, run all cells twice, and look at what the last one shows."""

import os
import re
import struct
from base64 import b64decode
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL = "--env test_dreamer:Corridor-v0 --steps 96 --prefill 48 --batch-length 12 --pretrain 4 "
SMALL += "--depth 2 --hidden 16 --units 16 --horizon 4 --episodes 1 --resume --runs "


def test_run_all_trains_shows_three_things_and_goes_on_when_run_again(tmp_path, monkeypatch):
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(HERE / "dreamer.py")
    first = notebook.cells[1]  # the first cell of code is the one with the parameters
    assert first.metadata["tags"] == ["parameters"]
    assert first.source.split("  # ")[0] == 'ARGUMENTS = "--resume"'
    headings = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert all(part in headings for part in ("1.6 Agent", "3.1 imagine", "4.1 train"))

    for steps in (0, 24):  # a second run goes on with the first one
        first.source = f'ARGUMENTS = "{SMALL}{tmp_path} --steps {96 + steps}"'
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=120, resources=where).execute()
        assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")

        outputs = notebook.cells[-1].outputs
        shown = [x.data["image/png"] for x in outputs if x.output_type == "display_data"]
        sizes = [struct.unpack(">II", b64decode(image)[16:24]) for image in shown]
        assert sizes == [(1500, 650), (1200, 430)]  # the curves, and the strip of frames
        text = "".join(x.text for x in outputs if x.output_type == "stream")
        assert float(re.search(r"env/step +(\S+)", text)[1]) >= 96 + steps

    first.source = f'ARGUMENTS = "--eval {tmp_path}/test_dreamer-Corridor-v0-0 --episodes 1"'
    nbclient.NotebookClient(notebook, timeout=120, resources=where).execute()
    outputs = notebook.cells[-1].outputs
    assert "eval/return" in "".join(x.text for x in outputs if x.output_type == "stream")
