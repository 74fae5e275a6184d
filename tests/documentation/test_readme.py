"""The README is short, its code runs, its links lead somewhere; tables of what works are those that are tested."""

import re
from pathlib import Path

import torch
from helpers import what_works

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_it_is_read_in_five_minutes():
    assert len(README.split()) <= 1200


def test_code_blocks_run_one_after_another():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["optimizer"].last_step.accepted
    assert torch.is_tensor(namespace["loss"])


def test_links_and_pictures_are_there():
    links = re.findall(r"\]\(([\w/.-]+)(?:#([\w-]+))?\)", README)
    assert len(links) > 15
    for path, place in links:
        assert (ROOT / path).exists(), path
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M) if place else []
        assert not place or place in {h.lower().replace(" ", "-") for h in headings}, place


def test_the_tables_of_what_works_are_up_to_date():
    text = what_works.PAGE.read_text()
    assert what_works.with_tables(text) == text, "run `make readme`"
