# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""The page of `florence-vl features`: computed, written, used in a browser, and from the command line."""

import re

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from florence_vl_hf.analysis import extract_features, load_vision_encoder, page
from florence_vl_hf.analysis.page import build_page, is_untrained, read_images, write_html, write_png
from florence_vl_hf.conversion import load_pretrained

from ..conftest import status, tiny_model
from ..conversion.test_assemble_florence_vl import native


__all__ = ["native"]

ONE_MODEL = pytest.mark.parametrize("golden", ["phi-small"], indirect=True, scope="session")
pytestmark = ONE_MODEL
ATTACK = "</script><script>document.title = 'attacked'</script><img src=x onerror=alert(1)>'\"&$x$"


@pytest.fixture(scope="module")
def paths(golden, tmp_path_factory):
    """Three photographs' worth of noise and shapes, one of them wide, one with a name that is an attack."""
    directory = tmp_path_factory.mktemp("images")
    names = {"odd.jpg": "odd.jpg", "wide.png": "wide.png", "square.png": f"{ATTACK.replace('/', '')}.png"}
    for source, name in names.items():
        (directory / name).write_bytes(golden.image_path(source).read_bytes())
    return sorted(directory.iterdir())


@pytest.fixture(scope="module")
def encoder(converted):
    return load_vision_encoder(converted, dtype=torch.float32)


class TestBuild:
    def test_colours_compare_across_images_unless_per_image(self, encoder, paths):
        alone = [build_page(encoder, read_images([path])).rows[0].maps["ocr"] for path in paths]
        together = [row.maps["ocr"] for row in build_page(encoder, read_images(paths)).rows]
        each = [row.maps["ocr"] for row in build_page(encoder, read_images(paths), per_image=True).rows]
        assert all(one.equal(other) for one, other in zip(alone, each, strict=True))
        assert not any(one.equal(other) for one, other in zip(alone, together, strict=True))
        twice = build_page(encoder, read_images([paths[0], paths[1], paths[0]])).rows
        assert twice[0].maps["ocr"].equal(twice[2].maps["ocr"])

    def test_many_images_are_read_twice_with_the_same_result(self, encoder, paths, monkeypatch, tmp_path):
        write_html(build_page(encoder, read_images(paths)), tmp_path / "kept.html", "x")
        monkeypatch.setattr(page, "MAX_KEPT", 1)
        write_html(build_page(encoder, read_images(paths)), tmp_path / "again.html", "x")
        assert (tmp_path / "kept.html").read_bytes() == (tmp_path / "again.html").read_bytes()
        monkeypatch.setattr(page, "MAX_DETAILED", 2)
        write_html(build_page(encoder, read_images(paths)), tmp_path / "short.html", "x")
        text = (tmp_path / "short.html").read_text(encoding="utf-8")
        assert text.count("data-vectors") == 2 * 4 and text.count("data-colors") == 3 * 4
        assert "for the first 2 images" in text

    def test_chosen_features_and_other_prompts(self, encoder, paths, native):
        shown = build_page(
            encoder, read_images(paths[:1]), {"sign": "Find the sign."}, tokenizer=native, features=["sign", "image"]
        )
        assert shown.captions == {"sign": "Find the sign.", "image": "Without a prompt."}
        assert list(shown.rows[0].maps) == ["sign", "image"]
        with pytest.raises(ValueError, match="There is no feature 'sign'; choose from image, caption, grounding"):
            build_page(encoder, read_images(paths), features=["sign"])

    def test_untrained_parts_are_named(self, encoder, paths):
        model = tiny_model()
        assert is_untrained(model.model.vision_tower) and is_untrained(model.model.language_model)
        assert is_untrained(model.model.multi_modal_projector)
        model.model.multi_modal_projector.layers[1].bias.data[3] = 0.1
        model.model.vision_tower.backbone.blocks[0][0].channel_block.norm1.weight.data[2] = 1.01
        model.model.language_model.norm.weight.data *= 0.9
        assert not is_untrained(model.model.vision_tower) and not is_untrained(model.model.language_model)
        assert not is_untrained(model.model.multi_modal_projector)
        assert build_page(encoder, read_images(paths[:1])).untrained == []


class TestFiles:
    def test_the_same_inputs_give_the_same_bytes(self, encoder, paths, tmp_path):
        pytest.importorskip("matplotlib")
        for name in ("one", "two"):
            shown = build_page(encoder, read_images(paths))
            write_html(shown, tmp_path / f"{name}.html", ATTACK)
            write_png(shown, tmp_path / f"{name}.png", ATTACK)
        for suffix in ("html", "png"):
            assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
        with Image.open(tmp_path / "one.png") as image:
            assert image.width > image.height > 500
        text = (tmp_path / "one.html").read_text(encoding="utf-8")
        assert text.count("<script>") == 1 and "onerror=alert(1)>" not in text
        assert re.findall(r"(?:src|href|url|import)[=(\s][\"']?(?!data:)\w+:", text) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "one.png", "two.html", "two.png"]


class TestBrowser:
    @pytest.mark.slow
    @pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
    def test_similarities_of_a_tapped_position(self, width, scheme, encoder, paths, browser, tmp_path):
        write_html(build_page(encoder, read_images(paths)), tmp_path / "page.html", ATTACK)
        opened, requests, errors = open_page(browser, tmp_path / "page.html", width, scheme)
        assert opened.title() == ATTACK
        assert opened.locator("h2").all_text_contents() == [path.name for path in paths]
        luminance = opened.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(luminance) < 128) == (scheme == "dark")
        size, expected = encoder.config.feature_grid_size, list(extract_features(encoder, paths))
        article = opened.locator("article").nth(1)
        tap(article.locator(".frame").nth(2), 7, size)
        for target in (0, 8, 24):
            # On another map than the one that was tapped.
            article.locator(".frame").nth(3).hover(position=center(article.locator(".frame").nth(3), target, size))
            for name, feature_map in expected[1].maps.items():
                figure = article.locator(f"figure[data-name={name}]")
                cosine = torch.nn.functional.cosine_similarity(*feature_map.flatten(0, 1)[[7, target]], dim=0)
                shown = float(figure.locator(".value").inner_text().replace("−", "-"))
                assert shown == pytest.approx(float(cosine), abs=0.011)
                assert figure.locator(".mark").is_visible()
        # The colours are those of the similarities: the most similar position is the brightest.
        units = torch.nn.functional.normalize(expected[1].maps["ocr"].flatten(0, 1), dim=1)
        others = (units @ units[7]).index_fill(0, torch.tensor([7]), -2)
        assert brightest(article.locator("figure[data-name=ocr] canvas"), skip=7) == int(others.argmax())
        tap(article.locator(".frame").nth(2), 7, size)  # releases it
        opened.locator("h1").hover()
        assert article.locator(".mark:visible").count() == 0
        assert errors == [] and [url for url in requests if not url.startswith("data:")] == [
            (tmp_path / "page.html").as_uri()
        ]

    @pytest.mark.slow
    def test_background_slider_and_keys(self, encoder, paths, browser, tmp_path):
        shown = build_page(encoder, read_images(paths), background=0.25)
        write_html(shown, tmp_path / "page.html", "x")
        opened, _, errors = open_page(browser, tmp_path / "page.html", 1280, "light")
        canvas = opened.locator("article").first.locator("figure[data-name=caption] canvas")
        first_component = shown.rows[0].maps["caption"][..., 0].flatten()
        for threshold in (0.25, 0.8):
            opened.fill("#threshold", str(threshold))
            opacities = torch.tensor(pixels(canvas)[3::4])
            assert (opacities < 255).tolist() == (first_component < 255 * threshold).tolist()
        frame = opened.locator("article").first.locator(".frame").first
        frame.press("ArrowRight")  # from the middle
        value = opened.locator("article").first.locator("figure[data-name=image] .value")
        [image] = extract_features(encoder, paths[:1])
        units = torch.nn.functional.normalize(image.maps["image"].flatten(0, 1), dim=1)
        others = torch.cat([(units @ units[13])[:13], (units @ units[13])[14:]])
        low, high = (float(part) for part in value.inner_text().replace("−", "-").split(" to "))
        assert (low, high) == pytest.approx((float(others.min()), float(others.max())), abs=0.011)
        frame.press("Escape")
        assert value.inner_text() == "" and errors == []

    @pytest.mark.slow
    def test_words_of_an_answer(self, converted, paths, browser, tmp_path):
        model, processor = load_pretrained(converted, dtype=torch.float32)
        shown = build_page(model, read_images(paths[:1]), processor=processor, question=f"What? {ATTACK}")
        write_html(shown, tmp_path / "page.html", "x")
        opened, _, errors = open_page(browser, tmp_path / "page.html", 360, "light")
        answer = shown.rows[0].answer
        assert opened.locator("button").all_inner_texts() == answer.words
        overlay = opened.locator("figure:not([data-name]) canvas")
        assert max(pixels(overlay)[3::4]) == 0
        for i in range(len(answer.words)):
            opened.locator("button").nth(i).click()
            weights = answer.weights[i, 0, shown.positions]
            opacities = torch.tensor(pixels(overlay)[3::4]).float()
            assert_close(opacities, 40 + 190 * weights / weights.max(), rtol=0, atol=2)
            total = f"{100 * answer.weights[i].sum():.1f} % of the attention is on image tokens"
            assert total in opened.locator(".answer output").inner_text()
        opened.locator("button").nth(len(answer.words) - 1).click()
        assert max(pixels(overlay)[3::4]) == 0 and errors == []


def open_page(browser, path, width, scheme):
    opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests, errors = [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("pageerror", lambda error: errors.append(error))
    opened.goto(path.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.evaluate("new Promise(requestAnimationFrame)")
    return opened, requests, errors


def center(frame, position, size):
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    return {"x": (position % size + 0.5) * box["width"] / size, "y": (position // size + 0.5) * box["height"] / size}


def tap(frame, position, size):
    frame.click(position=center(frame, position, size))


def pixels(canvas):
    return canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")


def brightest(canvas, skip):
    data = torch.tensor(pixels(canvas)).view(-1, 4)[:, :3].sum(dim=1)
    data[skip] = -1
    return int(data.argmax())


class TestCommand:
    def test_writes_both_files(self, converted, paths, native, tmp_path, capfd):
        pytest.importorskip("matplotlib")
        outputs = ["--output", tmp_path / "new" / "page.html", "--output", tmp_path / "page.png"]
        options = ["--model", converted, "--prompt", "sign=Find the sign.", "--tokenizer", native, "--device", "cpu"]
        assert status("features", paths[0].parent, paths[0], *options, *outputs) == 0
        assert "page.png: 5 maps of 4 images." in capfd.readouterr().out
        text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
        assert "Find the sign." in text and "Untrained" not in text

    def test_florence_2_alone(self, native, paths, tmp_path):
        assert status("features", *paths, "--model", native, "--output", tmp_path / "page.html") == 0
        assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<article") == 3

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("nowhere.png", [], "There is no image"),
            ("empty", [], "has no images"),
            ("text.png", ["--model", "nowhere"], "cannot be read as an image"),  # before the model
            ("good.png", ["--features", "image,sign"], "There is no feature 'sign'"),
            ("good.png", ["--prompt", "image=What?", "--tokenizer", "NATIVE"], "A prompt is named 'image'"),
            ("good.png", ["--prompt", "sign=What?", "--tokenizer", "nowhere"], "Own prompts require Florence-2's"),
            ("good.png", ["--question", "What?", "--layer", "99"], "has layers 0 to 1"),
            ("good.png", ["--model", "nowhere"], "nowhere is neither"),
        ],
    )
    def test_errors_are_one_line_and_nothing_is_written(
        self, name, options, message, converted, native, tmp_path, capfd
    ):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.png").write_text("text")
        Image.new("RGB", (30, 20), "red").save(tmp_path / "good.png")
        output = tmp_path / "page.html"
        output.write_text("before")
        options = [native if option == "NATIVE" else option for option in options]
        arguments = ["--model", converted, "--device", "cpu", *options, "--output", output]
        assert status("features", tmp_path / "good.png", tmp_path / name, *arguments) == 1
        [error] = [line for line in capfd.readouterr().err.split("\n") if line.startswith("florence-vl: ")]
        assert message in error and output.read_text() == "before"

    def test_too_many_images_for_a_png_or_a_question(self, converted, paths, tmp_path, monkeypatch, capfd):
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(page, "MAX_DETAILED", 2)
        for options in (["--output", tmp_path / "x.png"], ["--output", tmp_path / "x.html", "--question", "What?"]):
            assert status("features", *paths, "--model", converted, "--device", "cpu", *options) == 1
            assert "at most 2 images" in capfd.readouterr().err and list(tmp_path.iterdir()) == []

    def test_a_question_requires_a_language_model(self, native, paths, tmp_path, capfd):
        arguments = ["--model", native, "--question", "What?", "--output", tmp_path / "page.html"]
        assert status("features", paths[0], *arguments) == 1
        assert "has model type 'florence2', expected 'florence_vl'" in capfd.readouterr().err

    def test_output_is_html_or_png(self, converted, tmp_path, capfd):
        assert status("features", tmp_path, "--model", converted, "--output", tmp_path / "page.pdf") == 2
        assert "is not an .html or .png file" in re.sub(r"[\s│]+", " ", capfd.readouterr().err)
