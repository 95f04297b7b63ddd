# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import re
from pathlib import Path

import pytest

from florence_vl_hf.evaluation import load_questions, score, write_report

from ..conftest import llava_sample
from .conftest import write


ATTACK = """</script><script>document.title = "attacked"</script><img src=x onerror="document.title='attacked'">'\"&"""
ATTACK += "x" * 300


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report of a correct, a wrong, an unscored and a broken sample, all texts of which are attacks."""
    samples = [llava_sample(i, ["odd.jpg"] if i < 2 else []) for i in range(3)] + [llava_sample(3, ["nowhere.png"])]
    questions = load_questions(write(tmp_path, samples))
    common = {"id": ATTACK, "question": ATTACK}
    answers = [
        {**common, "answer": f"right{ATTACK}", "references": [f"right{ATTACK}"]},
        {**common, "answer": f"wrong{ATTACK}", "references": [ATTACK]},
        {**common, "answer": ATTACK, "references": []},
        {**common, "error": ATTACK, "references": [ATTACK]},
    ]
    write_report(tmp_path / "report.html", questions, answers, score(answers), f"Report {ATTACK}")
    return tmp_path / "report.html"


def test_text_is_escaped_and_images_are_inside(report):
    text = report.read_text(encoding="utf-8")
    assert 'onerror="' not in text and text.count("<script>") == 1 and text.count("<article") == 4
    assert text.count('src="data:image/jpeg;base64,') == 2
    assert re.findall(r"(?:src|href|url|import)[=(\s][\"']?(?!data:)\w+:", text) == []


@pytest.mark.slow
def test_in_a_browser(report, browser):
    for width, scheme in ((1200, "light"), (360, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        requests, errors = [], []
        page.on("request", lambda request, requests=requests: requests.append(request.url))
        page.on("pageerror", lambda error, errors=errors: errors.append(error))
        page.goto(report.as_uri())
        assert page.title() == f"Report {ATTACK}" and errors == []
        assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        luminance = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(luminance) < 128) == (scheme == "dark")
        page.evaluate("Promise.all([...document.images].map((i) => (i.loading = 'eager', i.decode())))")
        fits = "[...document.querySelectorAll('dd')].every((cell) => cell.scrollWidth <= cell.clientWidth)"
        assert page.evaluate(fits)

        def shown(search: str, scores: str, page=page) -> int:
            page.fill("#text", search)
            page.select_option("#range", label=scores)
            assert page.locator("#count").inner_text().split()[0] == str(page.locator("article:visible").count())
            return page.locator("article:visible").count()

        assert shown("", "all samples") == 4 and shown("RIGHT<", "all samples") == 1
        assert shown("", "score 100") == 1 and shown("right<", "score 0") == 0 and shown("wrong<", "score 0") == 1
        assert shown("", "score between 0 and 100") == 0 and shown("", "without a score") == 2
