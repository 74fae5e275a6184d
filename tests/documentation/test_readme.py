"""The README's code runs, and the tables of what works are those that the tests check."""

import re

import pytest
import torch
from helpers import what_works


def test_code_blocks_run_one_after_another():
    blocks = re.findall(r"```python\n(.*?)```", what_works.README.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    namespace = {}
    for block in blocks:
        exec(compile(block, what_works.README.name, "exec"), namespace)
        assert namespace["optimizer"].last_step is not None
        assert all(p.isfinite().all() for p in namespace["model"].parameters())
    assert torch.is_tensor(namespace["loss"])


@pytest.mark.parametrize("path", what_works.TABLES, ids=lambda path: path.stem)
def test_the_table_of_what_works_is_up_to_date(path):
    assert what_works.with_table(path) == path.read_text(), "run `make readme`"
