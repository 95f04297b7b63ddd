# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch.testing import assert_close

from florence_vl_hf.conversion import checkpoint_files, convert, read_original
from florence_vl_hf.conversion.model_card import PUBLISHED_RESULTS, write_model_card
from florence_vl_hf.conversion.original_config import describe_assumption

from ..conftest import FIXTURES, Golden


LLAMA = Golden(FIXTURES / "llama-small")
PHI = Golden(FIXTURES / "phi-small")


@pytest.fixture(scope="module")
def plan():
    return read_original(PHI.checkpoint)


def card_of(plan, source, folder: Path) -> ModelCard:
    write_model_card(folder, plan, source, "converted", {})
    return ModelCard.load(folder / "README.md")


class TestPublished:
    @pytest.mark.parametrize("stage", ["pretrain", "sft"])
    @pytest.mark.parametrize(
        ("size", "license", "base"),
        [("8b", "llama3.1", "meta-llama/Llama-3.1-8B-Instruct"), ("3b", "mit", "microsoft/Phi-3.5-mini-instruct")],
    )
    def test_metadata(self, size, license, base, stage, plan, tmp_path):
        card = card_of(plan, f"jiuhai/florence-vl-{size}-{stage}", tmp_path)
        assert card.data.license == license
        assert card.data.base_model == [base, "microsoft/Florence-2-large"]
        assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
        instructions = {
            "nyu-visionx/Cambrian-10M",
            "Vision-Flan/vision-flan_191-task_1k",
            "HuggingFaceM4/Docmatix",
        }
        captions = {"tomg-group-umd/pixelprose", "Lin-Chen/ShareGPT4V"}
        assert set(card.data.datasets) == captions | (instructions if stage == "sft" else set())
        assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
        assert ("Built with Llama" in card.text) == (size == "8b")

    @pytest.mark.parametrize(
        ("size", "docvqa", "mme", "other"), [("8b", 84.9, 1560.0, 403.9), ("3b", 82.1, 1498.7, 381.1)]
    )
    def test_results_are_marked_as_published(self, size, docvqa, mme, other, plan, tmp_path):
        text = card_of(plan, f"jiuhai/florence-vl-{size}-sft", tmp_path).text
        before, results = text.split("## Published results")
        assert "Nothing of this was measured" in results
        assert f"| DocVQA | {docvqa} |" in results and f"| MME-P | {mme} |" in results
        assert str(other) not in text
        assert (
            len(re.findall(r"^\| [\w-]+ \| [\d.]+ \|$", results, flags=re.MULTILINE)) == len(PUBLISHED_RESULTS) == 25
        )

    def test_no_results_after_pretraining(self, plan, tmp_path):
        assert "Published results" not in card_of(plan, "jiuhai/florence-vl-8b-pretrain", tmp_path).text


class TestUnknown:
    @pytest.mark.parametrize("source", [PHI.checkpoint, "someone/florence-vl-8b-sft", "jiuhai/florence-vl-8b-sft-hf"])
    def test_nothing_is_claimed(self, source, plan, tmp_path):
        card = card_of(plan, source, tmp_path)
        assert set(card.data.to_dict()) == {"pipeline_tag", "library_name", "tags"}
        assert not re.search("Published results|Licence|Llama-3|Phi-3|Florence-2-large", card.text)

    def test_folder_of_the_same_name_is_not_the_published_one(self, plan, tmp_path, monkeypatch):
        (tmp_path / "jiuhai" / "florence-vl-8b-sft").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert card_of(plan, "jiuhai/florence-vl-8b-sft", tmp_path).data.license is None


class TestConversion:
    def test_says_what_was_assumed_but_not_where_it_lay(self, tmp_path):
        source = Path(shutil.copytree(PHI.checkpoint, tmp_path / "original"))
        (source / "vision_tower" / "preprocessor_config.json").unlink()
        plan = convert(source, tmp_path / "out")
        text = (tmp_path / "out" / "README.md").read_text()
        assert str(tmp_path) in describe_assumption(plan.assumptions[0])
        assert "original/vision_tower has no preprocessor_config.json" in text and str(tmp_path) not in text

    def test_hub_id_stands_for_its_download(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint_files, "snapshot_download", lambda *_, **__: str(LLAMA.checkpoint))
        convert("jiuhai/florence-vl-8b-sft", tmp_path / "florence", LLAMA.vision_tower)
        card = ModelCard.load(tmp_path / "florence" / "README.md")
        assert card.data.license == "llama3.1"
        assert "record_reference.py --checkpoint jiuhai/florence-vl-8b-sft" in card.text
        assert "florence-vl verify florence --reference" in card.text
        assert str(LLAMA.checkpoint) not in card.text

    @pytest.mark.parametrize(("dtype", "said"), [(None, "copied, bit by bit"), (torch.float16, "cast to float16")])
    def test_says_whether_weights_were_cast(self, dtype, said, tmp_path):
        assert said in card_of(read_original(PHI.checkpoint, dtype=dtype), PHI.checkpoint, tmp_path).text

    def test_adapter_is_no_copy_of_a_published_checkpoint(self, plan, tmp_path):
        write_model_card(tmp_path, plan, "jiuhai/florence-vl-3b-sft", "mine", {}, base=PHI.checkpoint)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.license is None and "adapter that was put onto checkpoint" in card.text
        assert "bit by bit" not in card.text and "florence-vl verify" not in card.text

    def test_rows_that_were_added(self, plan, tmp_path):
        assert "rows of zeros" not in card_of(plan, PHI.checkpoint, tmp_path).text
        llama = read_original(LLAMA.checkpoint, vision_tower=LLAMA.vision_tower)
        assert "30 rows of zeros" in card_of(llama, LLAMA.checkpoint, tmp_path).text

    def test_use_of_a_pretrained_checkpoint_gives_what_its_format_gives(self, golden, tmp_path, capsys):
        """The card's prompt needs no format by name, so it also works where the package is not installed."""
        output = tmp_path / "plain"
        convert(golden.checkpoint, output, golden.vision_tower, chat_template="plain")
        shown = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), flags=re.DOTALL)[0]
        image = str(golden.image_path("odd.jpg"))
        names: dict = {}
        exec(shown.replace('"plain"', repr(str(output))).replace('"street.jpg"', repr(image)), names)
        messages = [{"role": "user", "content": [{"type": "image", "path": image}]}]
        settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        expected = names["processor"].apply_chat_template(messages, **settings)
        assert_close(names["inputs"]["input_ids"], expected["input_ids"], rtol=0, atol=0)
        assert capsys.readouterr().out
