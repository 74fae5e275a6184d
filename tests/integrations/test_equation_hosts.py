"""What the page on differential equations shows for DeepXDE and PINA, where these are installed."""

import re
from pathlib import Path

import pytest
from helpers.scripts import run_python

PAGE = Path(__file__).parents[2] / "docs" / "equations.md"


@pytest.mark.slow
@pytest.mark.parametrize("host", ["deepxde", "pina"])
def test_the_page_s_example_solves_its_equation(host, monkeypatch, tmp_path):
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    pytest.importorskip(host, reason=f"the example of {host} needs it; no extra installs it")
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (block,) = (
        block for block in blocks if re.search(rf"^(import|from) {host}\b", block, re.MULTILINE)
    )
    script = tmp_path / "example.py"
    script.write_text(block)
    run_python(script, folder=tmp_path)
