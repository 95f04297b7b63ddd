# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch.testing import assert_close
from transformers import IntervalStrategy

from florence_vl_hf.conversion import convert
from florence_vl_hf.model_cards import (
    Card,
    ConvertedCard,
    MergedCard,
    TrainedCard,
    Training,
    public_name,
    read_metadata,
    read_training,
    write_card,
)
from florence_vl_hf.model_cards.published import PUBLISHED_RESULTS
from florence_vl_hf.processing import FlorenceVLProcessor, load_chat_template

from ..conftest import FIXTURES, Golden, tiny_config


LLAMA = Golden(FIXTURES / "llama-small")
PHI = Golden(FIXTURES / "phi-small")
MINIMAL_METADATA = {"pipeline_tag", "library_name", "tags"}


def facts_of(processor: FlorenceVLProcessor, **facts: Any) -> dict[str, Any]:
    return {"name": "mine", "config": tiny_config(), "processor": processor, "num_parameters": 1000, **facts}


def written(card: Any, directory: Path) -> ModelCard:
    write_card(directory, card)
    text = (directory / "README.md").read_text(encoding="utf-8")
    assert text.endswith("}\n```\n") and "\n\n\n" not in text
    return ModelCard.load(directory / "README.md")


def convert_card(source: str | Path, processor: FlorenceVLProcessor, directory: Path, **facts: Any) -> ModelCard:
    return written(ConvertedCard(source=source, **facts_of(processor, **facts)), directory)


def some_training(**facts: Any) -> Training:
    defaults = {
        "stage": "finetune",
        "trained_parameters": {"projector": 1000},
        "dataset": "data.json",
        "num_samples": 8,
        "num_steps": 4,
        "num_epochs": 1.0,
        "max_length": 2048,
        "settings": {"learning_rate": 0.001},
        "versions": {"torch": "2.9"},
    }
    return Training(**{**defaults, **facts})


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cards") / "phi"
    convert(PHI.checkpoint, output)
    return output


@pytest.fixture(scope="module")
def processor(phi: Path) -> FlorenceVLProcessor:
    return FlorenceVLProcessor.from_pretrained(phi)


class TestPublished:
    @pytest.mark.parametrize("stage", ["pretrain", "sft"])
    @pytest.mark.parametrize(
        ("size", "license", "base"),
        [("8b", "llama3.1", "meta-llama/Llama-3.1-8B-Instruct"), ("3b", "mit", "microsoft/Phi-3.5-mini-instruct")],
    )
    def test_metadata(self, size, license, base, stage, processor, tmp_path):
        source = f"jiuhai/florence-vl-{size}-{stage}"
        card = convert_card(source, processor, tmp_path)
        assert card.data.license == license
        assert card.data.base_model == [source, base, "microsoft/Florence-2-large"]
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
    def test_results_are_marked_as_published(self, size, docvqa, mme, other, processor, tmp_path):
        text = convert_card(f"jiuhai/florence-vl-{size}-sft", processor, tmp_path).text
        before, results = text.split("## Published results")
        assert "None of them was measured" in results
        assert f"| DocVQA | {docvqa} |" in results and f"| MME-P | {mme} |" in results
        assert str(other) not in text
        rows = re.findall(r"^\| [\w-]+ \| [\d.]+ \|$", results, flags=re.MULTILINE)
        assert len(rows) == len(PUBLISHED_RESULTS) == 25

    def test_no_results_after_pretraining(self, processor, tmp_path):
        card = convert_card("jiuhai/florence-vl-8b-pretrain", processor, tmp_path)
        assert "Published results" not in card.text
        # It describes images, whatever its chat template.
        assert 'text="<image>"' in card.text and "apply_chat_template" not in card.text


class TestUnknown:
    @pytest.mark.parametrize("source", [PHI.checkpoint, "someone/florence-vl-8b-sft", "jiuhai/florence-vl-8b-sft-hf"])
    def test_nothing_is_claimed(self, source, processor, tmp_path):
        card = convert_card(source, processor, tmp_path)
        assert set(card.data.to_dict()) - {"base_model"} == MINIMAL_METADATA
        assert card.data.base_model == (None if source == PHI.checkpoint else [source])
        assert not re.search("Published results|Built with|Llama|Phi-3|Florence-2-large", card.text)
        assert "state them as `license`" in card.text

    def test_directory_of_the_same_name_is_not_the_published_one(self, processor, tmp_path, monkeypatch):
        (tmp_path / "jiuhai" / "florence-vl-8b-sft").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        card = convert_card("jiuhai/florence-vl-8b-sft", processor, tmp_path)
        assert set(card.data.to_dict()) == MINIMAL_METADATA

    def test_public_name_hides_where_a_directory_is(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert [public_name(path) for path in (tmp_path, ".", "me/mine")] == [tmp_path.name, tmp_path.name, "me/mine"]


class TestConversion:
    def test_names_assumptions_but_no_local_paths(self, tmp_path):
        source = Path(shutil.copytree(PHI.checkpoint, tmp_path / "original"))
        (source / "vision_tower" / "preprocessor_config.json").unlink()
        convert(source, tmp_path / "out")
        text = (tmp_path / "out" / "README.md").read_text()
        assert "* Assumption: The vision tower sets no image size" in text
        assert str(tmp_path) not in text

    def test_no_assumption(self, processor, tmp_path):
        assert "No assumption" in convert_card(PHI.checkpoint, processor, tmp_path).text
        text = convert_card(PHI.checkpoint, processor, tmp_path, assumptions=["One.", "Two."]).text
        assert "* Assumption: One.\n* Assumption: Two.\n" in text and "No assumption" not in text

    def test_commands_of_verification(self, processor, tmp_path):
        text = convert_card("someone/florence", processor, tmp_path).text
        assert "record_reference.py --checkpoint someone/florence " in text
        assert "florence-vl verify mine --reference" in text
        assert "--checkpoint ORIGINAL " in convert_card(PHI.checkpoint, processor, tmp_path).text

    @pytest.mark.parametrize(("dtype", "said"), [(None, "copied, bit by bit"), (torch.float16, "cast to float16")])
    def test_says_whether_weights_were_cast(self, dtype, said, tmp_path):
        convert(PHI.checkpoint, tmp_path / "out", dtype=dtype)
        assert said in (tmp_path / "out" / "README.md").read_text()

    def test_adapter_is_not_a_copy_of_a_published_checkpoint(self, processor, tmp_path):
        card = convert_card("jiuhai/florence-vl-3b-sft", processor, tmp_path, base=PHI.checkpoint)
        assert card.data.license is None and "adapter that was added to checkpoint" in card.text
        assert "bit by bit" not in card.text and "florence-vl verify" not in card.text
        assert card.data.base_model == ["jiuhai/florence-vl-3b-sft"]
        card = convert_card("me/lora", processor, tmp_path, base="me/base")
        assert card.data.base_model == ["me/base", "me/lora"]

    def test_added_rows_and_dropped_tensors(self, phi, tmp_path):
        text = (phi / "README.md").read_text()
        assert "of zeros" not in text and "* Dropped: 31 tensors " in text
        convert(LLAMA.checkpoint, tmp_path / "llama", LLAMA.vision_tower)
        assert "30 rows of zeros" in (tmp_path / "llama" / "README.md").read_text()

    def test_example_without_chat_template_gives_what_the_template_plain_gives(self, golden, tmp_path, capsys):
        """The card's prompt does not name a template, so it also works where the package is not installed."""
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


class TestTraining:
    def test_facts(self, processor, tmp_path):
        training = some_training(
            num_skipped=2,
            best_step=3,
            last_loss=1.5,
            evaluations={"old": {"loss": 1.25}, "new": {"loss": 1, "exact_match": 0.5}},
        )
        card = written(TrainedCard(base="me/base", training=training, **facts_of(processor)), tmp_path)
        for row in (
            "| language model | llama |",
            "| fusion | channel of image, caption, ocr |",
            "| images | 64 x 64, 5 tokens each, padded to a square, then resized |",
            "| parameters | 1,000 |",
            "| stage | finetune |",
            "| trained: projector | 1,000 parameters |",
            "| data | data.json, 8 samples |",
            "| skipped | 2 broken samples, counted each time |",
            "| steps | 4, 1.00 epochs |",
            "| weights | of step 3, the best in evaluation |",
            "| last training loss | 1.5000 |",
            "| maximum tokens per sample | 2,048 |",
            "| learning_rate | 0.001 |",
            "| torch | 2.9 |",
            "| set | exact_match | loss |",
            "| old |  | 1.2500 |",
            "| new | 0.5000 | 1.0000 |",
        ):
            assert f"\n{row}\n" in card.text, card.text
        assert "trained from me/base." in card.text and "LoRA" not in card.text
        assert card.data.base_model == "me/base" and card.data.datasets is None

    def test_only_facts_that_are_there(self, processor, tmp_path):
        card = written(
            TrainedCard(base=tmp_path, training=some_training(num_samples=1), **facts_of(processor)), tmp_path
        )
        assert "| data | data.json, 1 sample |" in card.text and "Nothing was evaluated." in card.text
        assert not re.search("skipped|the best in evaluation|last training loss", card.text)
        # No path of this machine.
        assert str(tmp_path.parent) not in card.content and f"trained from {tmp_path.name}." in card.text
        assert card.data.base_model is None

    def test_adapter_counts_lora_apart_and_loads_with_peft(self, processor, tmp_path):
        training = some_training(lora_parameters=64)
        facts = facts_of(processor, base="me/base", training=training, is_adapter=True, datasets=["me/data"])
        card = written(TrainedCard(**facts), tmp_path)
        assert "| parameters | 1,000, without those of LoRA |" in card.text
        assert "| trained: projector | 1,000 parameters |\n| trained: LoRA | 64 parameters |" in card.text
        assert 'from_pretrained("me/base", dtype="auto")\nmodel = PeftModel.from_pretrained(model, path)' in card.text
        assert "trust_remote_code" not in card.text and "florence-vl merge" in card.text
        assert card.data.library_name == "peft" and "lora" in card.data.tags
        assert card.data.base_model == "me/base" and card.data.datasets == ["me/data"]

    def test_metadata_has_the_facts_which_a_merged_model_shows_again(self, processor, tmp_path):
        training = some_training(lora_parameters=64, evaluations={"old": {"loss": 1.25}})
        facts = facts_of(processor, base="me/base")
        written(TrainedCard(training=training, is_adapter=True, datasets=["me/data"], **facts), tmp_path)
        assert read_training(tmp_path) == training
        merged = MergedCard(
            adapter=tmp_path,
            training=read_training(tmp_path),
            adapter_metadata={"license": "mit", **read_metadata(tmp_path)},
            **facts,
        )
        (tmp_path / "merged").mkdir()
        card = written(merged, tmp_path / "merged")
        assert card.data.library_name == "transformers" and "lora" not in card.data.tags
        assert card.data.license == "mit" and "licence `mit`" in card.text
        assert card.data.base_model == "me/base" and card.data.datasets == ["me/data"]
        assert f"me/base with the adapter (LoRA) {tmp_path.name} merged" in card.text
        assert "| trained: LoRA | 64 parameters |" in card.text and "| old | 1.2500 |" in card.text
        assert "PeftModel" not in card.text and str(tmp_path.parent) not in card.content
        assert read_training(tmp_path / "merged") == training

    def test_merged_without_facts_of_training(self, processor, tmp_path):
        text = written(MergedCard(adapter="me/lora", **facts_of(processor, base="me/base")), tmp_path).text
        assert "## Training" not in text and "## Evaluation" not in text

    def test_metadata_is_plain(self, processor, tmp_path):
        training = some_training(versions={"torch": torch.__version__}, settings={"strategy": IntervalStrategy.NO})
        written(TrainedCard(base="me/base", training=training, **facts_of(processor)), tmp_path)
        assert type(read_training(tmp_path).versions["torch"]) is str
        assert read_training(tmp_path) == training

    def test_card_of_another_tool_has_no_training(self, tmp_path):
        assert read_training(tmp_path) is None and read_metadata(tmp_path) == {}
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n## Training\n", encoding="utf-8")
        assert read_training(tmp_path) is None and read_metadata(tmp_path) == {"license": "mit"}

    @pytest.mark.parametrize("facts", ["[1]", "{stage: 1}", "{stage: finetune}", "{unknown: 1}"])
    def test_unreadable_facts_are_ignored_with_a_warning(self, facts, tmp_path, caplog):
        (tmp_path / "README.md").write_text(f"---\nflorence_vl_training: {facts}\n---\n# Card\n", encoding="utf-8")
        assert read_training(tmp_path) is None
        assert "Ignoring `florence_vl_training`" in caplog.text

    def test_wrong_type_is_refused(self):
        with pytest.raises(Exception, match="num_samples"):
            some_training(num_samples="eight")

    def test_broken_metadata(self, tmp_path):
        (tmp_path / "README.md").write_text("---\na: [\n---\n", encoding="utf-8")
        with pytest.raises(ValueError, match="README.md has metadata that cannot be read"):
            read_metadata(tmp_path)


class TestSaved:
    def test_claims_nothing_and_shows_use(self, phi, processor, tmp_path):
        config = type(tiny_config()).from_pretrained(phi)
        card = written(Card(name="me/mine", config=config, processor=processor), tmp_path)
        assert set(card.data.to_dict()) == MINIMAL_METADATA
        assert 'path = "me/mine"' in card.text and "apply_chat_template" in card.text
        assert "| language model | phi3 |" in card.text and "state them as `license`" in card.text

    @pytest.mark.parametrize("template", ["plain", None])
    def test_use_without_a_chat_template_for_questions(self, template, phi, tmp_path):
        processor = FlorenceVLProcessor.from_pretrained(phi)
        processor.chat_template = template and load_chat_template(template, processor.tokenizer)
        text = written(Card(name="mine", config=tiny_config(), processor=processor), tmp_path).text
        assert 'text="<image>"' in text and "apply_chat_template" not in text
