# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Build the documentation, and check what the README and the pages refer to."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import florence_vl_hf

from .test_code_blocks import PAGES, ROOT, code_blocks


README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = ["conversion", "training", "evaluation", "serving", "analysis"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    return directory


@pytest.mark.slow
def test_public_names_are_on_the_pages_of_the_api(site):
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for room in ROOMS:
        module = importlib.import_module(f"florence_vl_hf.{room}")
        # Constants are described where they are used.
        names = [name for name in module.__all__ if callable(getattr(module, name))]
        documented = [name for name in names if re.search(rf'id="florence_vl_hf\.[\w.]+\.{name}"', pages)]
        assert documented == names


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site):
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|img|link)[^>]*?(?:src|href)="https?://[^"]+"', page.read_text("utf-8")), (
            page
        )


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    docs = ROOT / "docs"
    assert sorted(navigation) == sorted(page.relative_to(docs).as_posix() for page in docs.rglob("*.md"))


def test_files_of_the_readmes_table_exist():
    rooms = "modeling|processing|conversion|model_cards|training|evaluation|serving|analysis|../florence_vl_cli"
    paths = re.findall(rf"`((?:{rooms})/[\w./*]+)`", README)
    assert "../florence_vl_cli/*.py" in paths
    assert len(paths) > 15
    for path in paths:
        assert list((ROOT / "src" / "florence_vl_hf").glob(path)), path


def test_links_of_the_readme_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", README):
        assert (ROOT / link).is_file(), link


def test_numbers_of_tokens_in_comments():
    """Configurations that pages describe as `# 3 x 577 tokens` have as many."""
    names, numbers = {"FlorenceVLConfig": florence_vl_hf.FlorenceVLConfig}, []
    for page in PAGES:
        for language, text in code_blocks(page):
            for code, factor, tokens in re.findall(r"^(FlorenceVLConfig\(.*\))  # (\d x )?(\d+) tokens", text, re.M):
                assert language == "python"
                numbers.append(int(tokens) * int(factor[:1] or 1))
                assert eval(code, names).num_image_tokens == numbers[-1], code
    assert {3 * 577, 577, 576} == set(numbers)


def test_default_configuration_has_the_size_of_the_8b():
    with torch.device("meta"):
        model = florence_vl_hf.FlorenceVLForConditionalGeneration(florence_vl_hf.FlorenceVLConfig())
    assert 8.4e9 < model.num_parameters() < 9.2e9
