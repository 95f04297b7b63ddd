# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""A small slice of `make fuzz`."""

import pytest

from .__main__ import fuzz


@pytest.mark.slow
def test_no_input_goes_wrong(tmp_path):
    """In a fork, like each command: what it sets for a process stays there."""
    wrong = fuzz(scale=0.01, seed=1, parts=["images", "chats", "files"], only=None, directory=tmp_path)
    assert wrong == {"images": {}, "chats": {}, "files": {}}


@pytest.mark.slow
def test_interrupted_commands_leave_a_complete_output_or_none(tmp_path):
    wrong = fuzz(scale=0.02, seed=1, parts=["kill convert", "kill train", "full disk"], only=None, directory=tmp_path)
    assert not any(wrong.values()), wrong
