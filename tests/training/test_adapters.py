# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from florence_vl_hf import FlorenceVLForConditionalGeneration
from florence_vl_hf.conversion import CheckpointError, load_original
from florence_vl_hf.quantization import quantization_config
from florence_vl_hf.training.adapters import lora_config, lora_target_modules, merge_adapter
from florence_vl_hf.training.arguments import CHECKPOINTING

from ..conftest import FIXTURES, enable_checkpointing, status, tiny_inputs, tiny_model


PROJECTOR = "model.multi_modal_projector"
LANGUAGE_MODEL = "model.language_model"
# The linear layers in each of the two layers of a language model.
LINEAR_LAYERS = {
    "llama": ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koqv")],
    "phi3": ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"],
    "gpt_neox": ["attention.dense", "attention.query_key_value", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"],
}


def text_config(model_type: str, hidden_size: int = 32, **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {"model_type": model_type, **sizes, **tokens, **changes}


def random_lora(model: FlorenceVLForConditionalGeneration, **settings: Any) -> PeftModel:
    """LoRA with random weights; by default it changes nothing at first."""
    torch.manual_seed(1)
    settings = {"init_lora_weights": False, **settings}
    wrapped = get_peft_model(model, lora_config(model, rank=4, alpha=1, dropout=0.0, **settings))
    if settings.get("train_projector"):
        with torch.no_grad():
            for parameter in wrapped.base_model.model.model.multi_modal_projector.parameters():
                parameter.add_(0.1)
    return wrapped


def labelled_inputs(model: nn.Module, images_per_sample: list[int]) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(model.config, images_per_sample)
    learned = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != model.config.image_token_id)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~learned, -100)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_inputs(model.config, [1, 2])).logits


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Except for float32 rounding, which grows with the logits."""
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


class TestLora:
    @pytest.mark.parametrize("model_type", LINEAR_LAYERS)
    def test_changes_exactly_the_linear_layers_of_the_language_model(self, model_type):
        model = tiny_model(text_config=text_config(model_type))
        expected_names = {
            f"{LANGUAGE_MODEL}.layers.{i}.{name}" for i in range(2) for name in LINEAR_LAYERS[model_type]
        }
        assert set(get_peft_model(model, lora_config(model)).targeted_module_names) == expected_names

    def test_bare_model(self):
        model = tiny_model().model
        wrapped = get_peft_model(model, lora_config(model))
        expected_names = {f"language_model.layers.{i}.{name}" for i in range(2) for name in LINEAR_LAYERS["llama"]}
        assert set(wrapped.targeted_module_names) == expected_names

    def test_settings_of_the_original(self):
        config = lora_config(tiny_model())
        assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (64, 16, 0.05, "none")
        assert config.modules_to_save is None

    @pytest.mark.parametrize("train_projector", [False, True])
    def test_gradients_reach_exactly_lora_and_what_is_asked(self, train_projector):
        model = random_lora(tiny_model(), train_projector=train_projector).train()
        model(**labelled_inputs(model, [1, 1])).loss.backward()
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        expected_names = {name for name, _ in model.named_parameters() if LANGUAGE_MODEL in name and ".lora_" in name}
        assert len(expected_names) == 2 * 2 * len(LINEAR_LAYERS["llama"])
        if train_projector:
            trained_copy = f"base_model.model.{PROJECTOR}.modules_to_save."
            expected_names |= {name for name, _ in model.named_parameters() if name.startswith(trained_copy)}
            assert sum("modules_to_save" in name for name in expected_names) == 2 * 3
        assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad} == expected_names

    def test_experts_can_be_reached(self):
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        model = tiny_model(text_config=text_config("qwen3_moe", num_key_value_heads=2, **experts))
        attention = {f"{LANGUAGE_MODEL}.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"}
        parameters = ["experts.down_proj", "experts.gate_up_proj"]
        config = lora_config(model, rank=4, dropout=0.0, target_parameters=parameters)
        wrapped = get_peft_model(model, config)
        assert set(wrapped.targeted_module_names) == attention
        assert len(wrapped.targeted_parameter_names) == 4

    def test_model_without_linear_layers(self):
        model = tiny_model()
        model.model.language_model.layers = nn.ModuleList()
        with pytest.raises(ValueError, match="LlamaModel has no linear layer"):
            lora_target_modules(model)

    @pytest.mark.parametrize("make", [lambda: nn.Linear(1, 1), lambda: random_lora(tiny_model())])
    def test_other_model(self, make):
        with pytest.raises(ValueError, match="Got a .*; give a Florence-VL without adapters"):
            lora_target_modules(make())


class TestCheckpointing:
    """For checkpointing, Trainer and peft make all embeddings require gradients, also those of a frozen tower."""

    @staticmethod
    def gradients(tmp_path: Path, **settings: Any) -> dict[str, torch.Tensor]:
        model = random_lora(tiny_model(), train_projector=settings.pop("train_projector"))
        found: dict[str, torch.Tensor] = {}

        class Record(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        arguments = TrainingArguments(
            tmp_path, use_cpu=True, max_steps=1, report_to=[], save_strategy="no", max_grad_norm=0.0, **settings
        )
        batch = labelled_inputs(model, [1, 2])
        trainer = Trainer(model, arguments, lambda _: batch, train_dataset=[0], callbacks=[Record()])
        trainer.train()
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert {layer.gradient_checkpointing for layer in layers} == {settings.get(CHECKPOINTING, False)}
        return found

    @pytest.mark.parametrize("train_projector", [False, True])
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_equal_gradients(self, train_projector, use_reentrant, tmp_path):
        expected = self.gradients(tmp_path, train_projector=train_projector)
        assert len(expected) == 28 + 6 * train_projector
        checkpointing = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}
        found = self.gradients(tmp_path, train_projector=train_projector, **checkpointing)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("train_projector", [False, True])
    def test_frozen_tower_keeps_no_activations(self, train_projector):
        model = random_lora(tiny_model(), train_projector=train_projector).train()
        enable_checkpointing(model.base_model.model)
        model.enable_input_require_grads()
        pixel_values = tiny_inputs(model.config, [1])["pixel_values"]
        seen = model.base_model.model.get_image_features(pixel_values=pixel_values)
        assert seen.last_hidden_state.grad_fn is None
        assert seen.pooler_output[0].requires_grad == train_projector


class TestSavedAdapter:
    @pytest.fixture
    def base(self, tmp_path) -> Path:
        tiny_model().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    @pytest.mark.parametrize("train_projector", [False, True])
    def test_loads_equal(self, train_projector, base, tmp_path):
        model = random_lora(
            AutoModelForImageTextToText.from_pretrained(base),
            train_projector=train_projector,
            use_dora=train_projector,
        )
        model.save_pretrained(tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert any(PROJECTOR in name for name in stored) == train_projector
        assert all(LANGUAGE_MODEL in name or PROJECTOR in name for name in stored)

        expected = logits(model)
        assert not torch.allclose(expected, logits(tiny_model()), atol=1e-3)
        loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "adapter")
        assert torch.equal(logits(loaded), expected)
        assert_same_logits(logits(loaded.merge_and_unload()), expected)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose hidden size fills a block of 4-bit weights of bitsandbytes; 32 does not."""
    directory = tmp_path_factory.mktemp("to_quantize")
    tiny_model(text_config=text_config("llama", hidden_size=128, intermediate_size=128)).save_pretrained(directory)
    return directory


class TestQLora:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_learns_and_merges_onto_the_unquantized_base(self, bits, directory, tmp_path):
        config = quantization_config(bits, compute_dtype=torch.float32)
        model = AutoModelForImageTextToText.from_pretrained(directory, quantization_config=config, device_map="cpu")
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        enable_checkpointing(model)
        model = get_peft_model(model, lora_config(model, rank=4, dropout=0.0, train_projector=True)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        inputs = labelled_inputs(model, [1, 2])
        losses = []
        for _ in range(4):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1

        model.save_pretrained(tmp_path / "adapter")
        plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(directory), tmp_path / "adapter")
        torch.testing.assert_close(logits(plain), logits(model), atol=0.5, rtol=0)
        merged = plain.merge_and_unload()
        assert not any("bitsandbytes" in type(module).__module__ for module in merged.modules())


class TestMerge:
    @pytest.fixture
    def adapter(self, converted, processor, tmp_path) -> Path:
        """As peft saves it: the adapter and a model card."""
        model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
        directory = tmp_path / "adapter"
        random_lora(model, train_projector=True).save_pretrained(directory)
        return directory

    @pytest.fixture
    def expected(self, converted, adapter) -> torch.Tensor:
        model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
        return logits(PeftModel.from_pretrained(model, adapter))

    def test_writes_a_complete_model(self, adapter, expected, converted, tmp_path, capfd):
        output = tmp_path / "merged"
        arguments = ["--dtype", "float32", "--max-shard-size", "200KB"]
        assert status("merge", adapter, output, *arguments) == 0
        assert f"Wrote {output}: " in capfd.readouterr().out
        assert (output / "model.safetensors.index.json").is_file()
        assert (output / "modeling_florence_vl.py").is_file()
        assert "AutoProcessor" in json.loads((output / "config.json").read_text())["auto_map"]
        assert not list(output.glob("adapter*"))

        model, report = AutoModelForImageTextToText.from_pretrained(output, dtype="auto", output_loading_info=True)
        assert not any(report.values()) and model.dtype == torch.float32
        assert_same_logits(logits(model), expected)
        base = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
        assert not torch.allclose(logits(base), expected, atol=1e-3)
        assert model.generation_config.to_dict() == base.generation_config.to_dict()
        processors = [AutoProcessor.from_pretrained(directory) for directory in (output, converted)]
        assert processors[0].to_dict() == processors[1].to_dict()
        assert processors[0].chat_template == processors[1].chat_template

    def test_keeps_the_dtype_of_the_base(self, adapter, converted, tmp_path):
        merged = merge_adapter(adapter, tmp_path / "merged", base=converted)
        stored = AutoModelForImageTextToText.from_pretrained(converted, dtype="auto")
        dtypes = {name: p.dtype for name, p in merged.named_parameters()}
        assert dtypes == {name: p.dtype for name, p in stored.named_parameters()}

    def test_uses_the_processor_of_the_adapter_and_metadata_of_its_card(self, adapter, processor, converted, tmp_path):
        own = AutoProcessor.from_pretrained(converted)
        own.chat_template = "{{ 'trained with this' }}"
        own.save_pretrained(adapter)
        (adapter / "README.md").write_text("---\nlibrary_name: peft\nlicense: mit\n---\n# Trained\n", encoding="utf-8")
        merge_adapter(adapter, tmp_path / "merged")
        assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template == own.chat_template
        card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
        assert "library_name: transformers" in card and "license: mit" in card
        # The text describes the adapter, and nothing is known about its training.
        assert "# Trained" not in card and "## Training" not in card and "AutoModelForImageTextToText" in card

    @pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
    def test_variants_of_lora(self, settings, tmp_path, converted):
        model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
        wrapped = random_lora(model, **settings)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1.1)
        wrapped.save_pretrained(tmp_path / "adapter")
        merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
        assert_same_logits(logits(merged), logits(wrapped))

    def test_onto_an_original_checkpoint(self, tmp_path):
        original = FIXTURES / "phi-small" / "checkpoint"
        model, _ = load_original(original, dtype=torch.float32)
        wrapped = random_lora(model)
        wrapped.save_pretrained(tmp_path / "adapter")
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=original, dtype=torch.float32)
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        assert_same_logits(logits(merged), logits(wrapped))
        AutoProcessor.from_pretrained(tmp_path / "merged")


def save_base(directory: Path, **text_changes: Any) -> None:
    changes = {"text_config": text_config(**text_changes)} if text_changes else {}
    tiny_model(**changes).save_pretrained(directory)
    _, processor = load_original(FIXTURES / "phi-small" / "checkpoint")
    processor.save_pretrained(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_base(directory / "base")
    model = AutoModelForImageTextToText.from_pretrained(directory / "base")
    random_lora(model).save_pretrained(directory / "adapter")
    return directory


class TestMergeRefuses:
    """Nothing is written then."""

    @pytest.fixture
    def base(self, saved, tmp_path) -> Path:
        return Path(shutil.copytree(saved / "base", tmp_path / "base"))

    @pytest.fixture
    def adapter(self, saved, base, tmp_path) -> Path:
        directory = Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))
        self.edit(directory / "adapter_config.json", base_model_name_or_path=str(base))
        return directory

    @staticmethod
    def refuses(adapter: Path, message: str, **settings: Any) -> None:
        output = adapter.parent / "merged"
        with pytest.raises(CheckpointError, match=message):
            merge_adapter(adapter, output, **settings)
        assert not output.exists() and not list(output.parent.glob(".merged*"))

    @staticmethod
    def edit(path: Path, **changes: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def test_directory_without_an_adapter(self, base):
        self.refuses(base, "has no adapter_config.json")

    def test_no_directory(self, tmp_path):
        self.refuses(tmp_path / "nowhere", "neither a (folder|directory) nor the id")

    def test_adapter_of_the_original(self, adapter):
        torch.save({}, adapter / "non_lora_trainables.bin")
        self.refuses(adapter, "florence-vl convert")

    def test_pickle(self, adapter):
        weights = load_file(adapter / "adapter_model.safetensors")
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(weights, adapter / "adapter_model.bin")
        self.refuses(adapter, "no adapter_model.safetensors")

    def test_unknown_kind_of_adapter(self, adapter):
        self.edit(adapter / "adapter_config.json", peft_type="NEWER")
        self.refuses(adapter, "of type NEWER, expected LORA")

    def test_no_base_named(self, adapter):
        self.edit(adapter / "adapter_config.json", base_model_name_or_path=None)
        self.refuses(adapter, "give it with `--base`. Got an empty path")

    def test_base_moved_away(self, adapter, base):
        shutil.move(base, base.with_name("elsewhere"))
        self.refuses(adapter, "base model cannot be read; give it with `--base`. .*base is neither")

    def test_base_of_another_kind(self, adapter, base):
        self.edit(base / "config.json", model_type="llava")
        self.refuses(adapter, "has model type 'llava', expected 'florence_vl'")

    def test_quantized_base(self, adapter, base):
        self.edit(base / "config.json", quantization_config=quantization_config(4).to_dict())
        self.refuses(adapter, "is quantized")

    def test_base_of_another_size(self, adapter, tmp_path):
        save_base(tmp_path / "larger", model_type="llama", hidden_size=64)
        self.refuses(adapter, "does not fit .*larger", base=tmp_path / "larger")

    def test_base_of_another_family(self, adapter, tmp_path):
        save_base(tmp_path / "phi", model_type="phi3")
        self.refuses(adapter, "does not fit .*phi", base=tmp_path / "phi")

    def test_too_few_and_too_many_tensors(self, adapter):
        path = adapter / "adapter_model.safetensors"
        complete = load_file(path)
        name = next(iter(complete))
        save_file({key: value for key, value in complete.items() if key != name}, path)
        self.refuses(adapter, "1 tensors are missing or unexpected")
        save_file({**complete, name.replace("layers.0", "layers.7"): complete[name].clone()}, path)
        self.refuses(adapter, "1 tensors are missing or unexpected, such as .*layers.7")

    def test_not_a_number(self, adapter):
        path = adapter / "adapter_model.safetensors"
        complete = load_file(path)
        complete[next(iter(complete))][0, 0] = float("nan")
        save_file(complete, path)
        self.refuses(adapter, "NaNs detected")

    def test_adapter_that_is_no_lora(self, base, tmp_path):
        model = AutoModelForImageTextToText.from_pretrained(base)
        config = IA3Config(target_modules=lora_target_modules(model), feedforward_modules=[])
        get_peft_model(model, config).save_pretrained(tmp_path / "ia3")
        self.refuses(tmp_path / "ia3", "of type IA3, expected LORA")

    def test_existing_output(self, adapter):
        (adapter.parent / "full").mkdir()
        (adapter.parent / "full" / "file").touch()
        with pytest.raises(CheckpointError, match="exists already"):
            merge_adapter(adapter, adapter.parent / "full")
