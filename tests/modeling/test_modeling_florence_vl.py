# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import copy
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import pad
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Florence2ForConditionalGeneration,
)

from florence_vl_hf import FlorenceVLForConditionalGeneration, FlorenceVLModel
from florence_vl_hf.conversion import load_original
from florence_vl_hf.conversion.key_mapping import to_converted
from florence_vl_hf.conversion.reference import LOGITS_STRIDE
from florence_vl_hf.conversion.verification import Tolerances
from florence_vl_hf.modeling.modeling_florence_vl import (
    FlorenceVLImageFeaturesOutput,
    FlorenceVLVisionBlock,
    FlorenceVLVisionTower,
)
from florence_vl_hf.modeling.transformers_compat import CACHE

from ..conftest import enable_checkpointing, tiny_config, tiny_inputs, tiny_model


def count_calls(module: torch.nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the first input of every later call of a module."""
    calls: list[tuple[int, ...]] = []
    module.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape) if args else ()))
    return calls


class TestAgainstTheOriginal:
    @torch.no_grad()
    def test_features(self, golden, model):
        """In float64, relative to the largest value of each feature: what is left is the recording's own rounding."""
        model = copy.deepcopy(model).double()
        output = model.get_image_features(golden.tensors["pixel_values"].double(), output_hidden_states=True)
        prompt_features = torch.cat([output.features[name] for name in ("caption", "ocr", "grounding")], dim=-1)
        computed = {
            "davit": output.hidden_states[-1].flatten(2).transpose(1, 2),
            "image_feature": output.features["image"],
            "encoder_last_hidden_state": prompt_features,
            "projected": torch.stack(output.pooler_output),
        }
        for name, feature in computed.items():
            recorded = golden.tensors[name].double()
            assert_close(feature, recorded, rtol=0, atol=2e-5 * recorded.abs().max().item(), msg=name)
        assert_close(output.last_hidden_state, torch.cat([output.features["image"], prompt_features], dim=-1))

    @pytest.mark.parametrize("golden", ["phi-small"], indirect=True)
    @pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
    def test_float32_is_exact_at_full_resolution(self, golden, attn_implementation):
        """One float32 chain over the 36,864 positions of the first block group would be off by more."""
        image = Image.open(golden.image_path("odd.jpg"))
        model, processor = load_original(
            golden.checkpoint,
            vision_tower=golden.vision_tower,
            attn_implementation=attn_implementation,
            dtype=torch.float32,
            image_size=768,
        )
        size = {"height": 768, "width": 768}
        pixel_values = processor.image_processor(image, size=size, return_tensors="pt").pixel_values
        with torch.no_grad():
            fused = model.get_image_features(pixel_values).last_hidden_state
            exact = model.double().get_image_features(pixel_values.double()).last_hidden_state
        assert_close(fused.double(), exact, rtol=0, atol=5e-5)

    def test_logits_loss_and_gradients(self, golden, model):
        parameters = dict(model.named_parameters())
        for i, forward in enumerate(golden.reference["forwards"]):
            inputs = golden.forward_inputs(forward, model.config)
            model.zero_grad()
            output = model(**inputs)
            output.loss.backward()

            recorded = golden.tensors[f"forward{i}.logits"]
            attended = inputs["attention_mask"].bool()
            logits = output.logits[..., ::LOGITS_STRIDE][..., : recorded.shape[-1]]
            assert_close(logits[attended], recorded[attended], rtol=0, atol=Tolerances.logits)
            assert output.loss.item() == pytest.approx(forward["loss"], abs=Tolerances.logits)
            for name, norm in forward["grad_norms"].items():
                gradient = parameters[to_converted(name).name].grad
                assert gradient.norm().item() == pytest.approx(norm, rel=1e-2), name

    def test_greedy_tokens(self, golden, model, processor):
        for generation in golden.reference["generations"]:
            messages = golden.messages(generation["dialog"], generation["image"])[:1]
            inputs = processor.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            output_ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            assert output_ids[0, inputs["input_ids"].shape[1] :].tolist() == generation["generated_ids"]


class TestVisionTower:
    def test_equals_florence_2_of_transformers(self):
        """With the weights of DaViT, projection and encoder, Florence-2 of Transformers gives the same features."""
        model = tiny_model()
        tower = model.model.vision_tower
        theirs = Florence2ForConditionalGeneration(copy.deepcopy(model.config.vision_config)).eval().model
        theirs.vision_tower.load_state_dict(tower.backbone.state_dict())
        theirs.multi_modal_projector.load_state_dict(tower.image_projector.state_dict())
        theirs.language_model.encoder.load_state_dict(tower.encoder.state_dict())
        pixel_values = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            image_feature = theirs.get_image_features(pixel_values, return_dict=True).pooler_output
            prompt = theirs.language_model.encoder.embed_tokens(torch.tensor([[0, 9, 2, 1]] * 2))
            encoded = theirs.language_model.encoder(inputs_embeds=torch.cat([image_feature, prompt], dim=1))
            output = model.get_image_features(pixel_values)
        assert_close(output.features["image"], image_feature)
        assert_close(output.features["ocr"], encoded.last_hidden_state[:, :5])

    def test_runs_davit_once_and_builds_no_decoder(self):
        model = tiny_model()
        calls = count_calls(model.model.vision_tower.backbone)
        model.get_image_features(torch.randn(3, 3, 64, 64))
        assert calls == [(3, 3, 64, 64)]
        assert not [name for name, _ in model.named_modules() if "decoder" in name]

    def test_does_not_run_the_encoder_without_prompts(self):
        model = tiny_model(fusion_features=["image"])
        calls = count_calls(model.model.vision_tower.encoder.layernorm_embedding)
        output = model.get_image_features(torch.randn(2, 3, 64, 64))
        assert calls == []
        assert_close(output.last_hidden_state, output.features["image"])

    def test_batched_prompts_equal_single_prompts(self):
        pixel_values = torch.randn(2, 3, 64, 64)
        prompt_token_ids = {"caption": [0, 7, 8, 9, 10, 2], "ocr": [0, 9, 2]}  # of different lengths
        together = tiny_model(prompt_token_ids=prompt_token_ids).get_image_features(pixel_values).features
        for name in ("caption", "ocr"):
            alone = tiny_model(prompt_token_ids=prompt_token_ids, fusion_features=["image", name], projector_depth=1)
            alone.model.vision_tower.load_state_dict(
                tiny_model(prompt_token_ids=prompt_token_ids).model.vision_tower.state_dict()
            )
            assert_close(together[name], alone.get_image_features(pixel_values).features[name])

    def test_prompt_padding_is_attended_to_unless_masked(self):
        pixel_values = torch.randn(1, 3, 64, 64)
        read = tiny_model().get_image_features(pixel_values).features["ocr"]
        masked = tiny_model(mask_prompt_padding=True).get_image_features(pixel_values).features["ocr"]
        without = {"caption": [0, 7, 8, 2], "ocr": [0, 9, 2]}
        trimmed = tiny_model(prompt_token_ids=without).get_image_features(pixel_values).features["ocr"]
        assert_close(masked, trimmed)
        assert not torch.allclose(masked, read)

    def test_image_feature_sources_keep_their_order(self):
        pixel_values = torch.randn(1, 3, 64, 64)
        usual = tiny_model().get_image_features(pixel_values).features["image"]
        turned = tiny_model(image_feature_source=["last_frame", "spatial_avg_pool"])
        assert_close(turned.get_image_features(pixel_values).features["image"], usual[:, [1, 2, 3, 4, 0]])

    def test_returns_hidden_states_and_attentions_on_request(self):
        model = tiny_model()
        model.set_attn_implementation("eager")
        output = model.get_image_features(torch.randn(2, 3, 64, 64), output_hidden_states=True, output_attentions=True)
        assert [tuple(state.shape[1:]) for state in output.hidden_states] == [
            (16, 16, 16),
            (16, 16, 16),
            (16, 8, 8),
            (32, 4, 4),
            (32, 4, 4),
            (32, 2, 2),
        ]
        assert len(output.attentions) == 2 * 5
        for attention in output.attentions:
            assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))
        assert [tuple(state.shape) for state in output.encoder_hidden_states] == [(2, 2, 9, 16)] * 3
        assert [tuple(attention.shape) for attention in output.encoder_attentions] == [(2, 2, 2, 9, 9)] * 2
        assert model.get_image_features(torch.randn(2, 3, 64, 64)).hidden_states is None

    def test_channel_attention_does_not_use_the_attention_interface(self):
        shapes = []

        def no_large_heads(module, query, key, value, attention_mask, **kwargs):
            shapes.append(tuple(query.shape))
            return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register("no_large_heads", no_large_heads)
        model, pixel_values = tiny_model(), torch.randn(1, 3, 64, 64)
        expected = model.get_image_features(pixel_values).last_hidden_state
        model.config.vision_config.vision_config._attn_implementation = "no_large_heads"
        assert_close(model.get_image_features(pixel_values).last_hidden_state, expected)
        assert len(shapes) == 5  # the window attentions
        assert {shape[-1] for shape in shapes} == {8}

    @pytest.mark.parametrize("num_images", [1, 2])
    def test_inputs_of_linear_layers_are_contiguous(self, num_images):
        # Kernels of serving engines require it. Dimensions of size 1 make some views of other strides pass unnoticed.
        config = tiny_config()
        config.vision_config.vision_config.num_groups = [1, 1, 1, 1]
        model = FlorenceVLForConditionalGeneration(config)
        strides = {}
        for name, module in model.model.vision_tower.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, args, name=name: strides.update({name: args[0].stride(-1)}))
        model.get_image_features(torch.randn(num_images, 3, 64, 64))
        assert set(strides.values()) == {1}

    @pytest.mark.slow
    @torch.no_grad()
    def test_compiled_equals_eager(self):
        config = tiny_config()
        # A single stage, whose two blocks share a graph: the C++ compiler takes seconds for each graph.
        stage = {"depths": 2, "embed_dim": 32, "num_heads": 4, "num_groups": 4, "patch_prenorm": False}
        patch = {"patch_size": 32, "patch_stride": 32, "patch_padding": 0}
        for name, value in (stage | patch).items():
            setattr(config.vision_config.vision_config, name, [value])
        tower = FlorenceVLVisionTower(config).eval()
        images = torch.randn(3, 3, 64, 64)
        expected = tower(images).features
        tower.compile(fullgraph=True)
        for num_images in (1, 3):
            features = tower(images[:num_images]).features
            assert_close(
                features, {name: feature[:num_images] for name, feature in expected.items()}, rtol=0, atol=1e-5
            )

    @pytest.mark.slow
    @torch.no_grad()
    def test_compiled_blocks_share_graphs(self):
        torch.compiler.reset()
        tower = tiny_model().model.vision_tower
        graphs = CompileCounter()
        tower.compile(fullgraph=True, backend=graphs)
        for num_images, num_graphs in ((1, 5), (2, 10), (3, 10)):  # four stages and BART; then for any number
            tower(torch.randn(num_images, 3, 64, 64))
            assert graphs.frame_count == num_graphs

    def test_compiled_keeps_the_names_of_weights(self):
        tower = tiny_model().model.vision_tower
        names = list(tower.state_dict())
        tower.compile(backend="eager")
        assert list(tower.state_dict()) == names

    def test_wrong_image_size_is_an_error(self):
        with pytest.raises(ValueError, match=r"\(1, 3, 96, 96\), expected \(num_images, 3, 64, 64\)"):
            tiny_model().get_image_features(torch.randn(1, 3, 96, 96))


class TestFusion:
    def test_strategies(self):
        pixel_values = torch.randn(2, 3, 64, 64)
        channel = tiny_model().get_image_features(pixel_values)
        features = list(channel.features.values())
        assert list(channel.features) == ["image", "caption", "ocr"]
        assert_close(channel.last_hidden_state, torch.cat(features, dim=-1))
        token = tiny_model(fusion_strategy="token").get_image_features(pixel_values)
        assert_close(token.last_hidden_state, torch.cat(features, dim=1))
        average = tiny_model(fusion_strategy="average").get_image_features(pixel_values)
        assert_close(average.last_hidden_state, sum(features) / 3)

    def test_features_have_the_order_of_the_configuration(self):
        output = tiny_model(fusion_features=["ocr", "image"]).get_image_features(torch.randn(1, 3, 64, 64))
        assert list(output.features) == ["ocr", "image"]
        assert_close(output.last_hidden_state, torch.cat([output.features["ocr"], output.features["image"]], dim=-1))

    @pytest.mark.parametrize("strategy", ["channel", "token", "average"])
    def test_every_strategy_generates(self, strategy):
        model = tiny_model(fusion_strategy=strategy)
        inputs = tiny_inputs(model.config, [1])
        pooled = model.get_image_features(inputs["pixel_values"]).pooler_output
        assert [tuple(image.shape) for image in pooled] == [(model.config.num_image_tokens, 32)]
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


class TestForward:
    def test_left_padded_batch_with_any_number_of_images_equals_single_samples(self):
        model = tiny_model()
        batch = tiny_inputs(model.config, [1, 0, 2])
        logits = model(**batch).logits
        images = iter(batch["pixel_values"].split([1, 0, 2]))
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            pixel_values = next(images)
            single = model(
                input_ids=ids[mask.bool()][None], pixel_values=pixel_values if len(pixel_values) else None
            ).logits
            assert_close(logits[row, mask.bool()], single[0], rtol=0, atol=1e-5)

    def test_image_features_replace_image_tokens(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [2])
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[:, :10] = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
        by_hand = model.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        assert_close(model.model(**inputs).last_hidden_state, by_hand.last_hidden_state)

    def test_inputs_embeds_instead_of_input_ids(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 1])
        logits = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert_close(model(inputs_embeds=embeds, **inputs).logits, logits)

    def test_mm_encoder_outputs_instead_of_pixel_values(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 2])
        logits = model(**inputs).logits
        encoded = {"image": model.get_image_features(inputs["pixel_values"])}
        with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
            model(**inputs, mm_encoder_outputs=encoded)
        del inputs["pixel_values"]
        calls = count_calls(model.model.vision_tower)
        assert_close(model(**inputs, mm_encoder_outputs=encoded).logits, logits)
        assert calls == []

    @pytest.mark.parametrize("num_images", [1, 3])
    def test_numbers_of_image_tokens_and_features_must_match(self, num_images):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [2])
        inputs["pixel_values"] = torch.randn(num_images, 3, 64, 64)
        message = f"do not match, tokens: 10, features: {5 * num_images}"
        with pytest.raises(ValueError, match=message):
            model(**inputs)

    def test_requires_either_input_ids_or_inputs_embeds(self):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            tiny_model()(attention_mask=torch.ones(1, 3))

    def test_logits_to_keep(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1])
        logits = model(**inputs).logits
        assert_close(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
        assert_close(model(**inputs, logits_to_keep=torch.tensor([3, 5])).logits, logits[:, [3, 5]])

    @pytest.mark.slow
    @pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
    def test_attention_implementations_agree(self, implementation):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 0, 2])
        attended = inputs["attention_mask"].bool()
        with torch.no_grad():
            logits = model(**inputs).logits[attended]
            model.set_attn_implementation(implementation)
            assert_close(model(**inputs).logits[attended], logits, rtol=0, atol=1e-5)

    def test_implementation_per_sub_model(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path, attn_implementation={"vision_config": "eager", "text_config": "sdpa"}
        )
        tower = model.model.vision_tower
        assert tower.backbone.config._attn_implementation == "eager"
        assert tower.encoder.config._attn_implementation == "eager"
        assert model.model.language_model.config._attn_implementation == "sdpa"

    @pytest.mark.slow
    def test_compiles_to_one_graph(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 1])
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


class TestGenerate:
    def test_pixel_values_may_be_none(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [0, 0])
        expected = model.generate(**inputs, max_new_tokens=3)
        assert torch.equal(model.generate(**inputs, pixel_values=None, max_new_tokens=3), expected)

    def test_equal_images_are_encoded_once(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [2, 1, 2])
        pixel_values = inputs.pop("pixel_values")[[0, 1, 0, 1, 2]]
        # Features of each image by itself, encoded before.
        features = [model.get_image_features(image[None]).pooler_output[0] for image in pixel_values]
        settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
        outputs = {"image": FlorenceVLImageFeaturesOutput(pooler_output=features)}
        expected = model.generate(**inputs, mm_encoder_outputs=outputs, **settings)
        calls = count_calls(model.model.vision_tower)
        generated = model.generate(**inputs, pixel_values=pixel_values, **settings)
        assert calls == [(3, 3, 64, 64)]
        assert_close(generated.logits, expected.logits, rtol=0, atol=1e-5)

    def test_images_with_nan_stay_apart(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 1])
        inputs["pixel_values"][1, 0, 0, 0] = torch.nan
        settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        (logits,) = model.generate(**inputs, **settings).logits
        assert logits.isnan().any(dim=1).tolist() == [False, True]

    def test_pixel_values_and_features_exclude_each_other(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1])
        outputs = {"image": model.get_image_features(inputs["pixel_values"])}
        with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
            model.generate(**inputs, mm_encoder_outputs=outputs)

    def test_mixed_batch_equals_single_samples(self):
        model = tiny_model()
        numbers = [0, 1, 2, 3] * 4
        samples = [tiny_inputs(model.config, [number], 2 + 3 * i) for i, number in enumerate(numbers)]
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        expected = [model.generate(**sample, **settings)[0, -6:] for sample in samples]
        length = max(sample["input_ids"].shape[1] for sample in samples)
        batch = {
            name: torch.cat([pad(sample[name], (length - sample[name].shape[1], 0)) for sample in samples])
            for name in ("input_ids", "attention_mask")
        }
        batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples if "pixel_values" in sample])
        assert torch.equal(model.generate(**batch, **settings)[:, -6:], torch.stack(expected))

    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": False},
            {"do_sample": False, "num_beams": 3},
            {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 2},
        ],
        ids=["greedy", "beams", "several beams", "samples"],
    )
    @pytest.mark.parametrize("sliding_window", [None, 7])
    def test_samples_with_different_numbers_of_images_are_read_apart(self, settings, sliding_window, monkeypatch):
        model = tiny_model()
        if sliding_window is not None:
            text = model.config.text_config.to_dict() | {"model_type": "mistral", "sliding_window": sliding_window}
            model = tiny_model(text_config=text)
        inputs = tiny_inputs(model.config, [1, 0, 2, 0, 1])
        inputs["attention_mask"][1, :-3] = 0  # a shorter text
        settings = {**settings, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}

        def run() -> Any:
            torch.manual_seed(0)
            return model.generate(**inputs, **settings)

        lengths = []
        handle = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        apart = run()
        handle.remove()
        assert lengths[:4] == [6, 11, 16, 1]
        monkeypatch.setattr(type(model), "_can_prefill_apart", lambda *args: False)
        together = run()
        assert torch.equal(apart.sequences, together.sequences)
        assert_close(apart.logits, together.logits, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "settings",
        [{"output_hidden_states": True}, {"output_attentions": True}, {"prefill_chunk_size": 4}, {"use_cache": False}],
    )
    def test_what_requires_a_single_forward(self, settings):
        model = tiny_model(attn_implementation="eager")
        inputs = tiny_inputs(model.config, [1, 0])
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **settings)
        assert torch.equal(output.sequences, expected)
        if "output_hidden_states" in settings:
            assert output.hidden_states[0][0].shape[:2] == inputs["input_ids"].shape

    def test_cached_decoding_equals_full_forwards(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 0])
        output_ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        length = inputs["input_ids"].shape[1]
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for step in range(6):
            logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -1]
            logits[:, [model.config.image_token_id, 2]] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            assert output_ids[:, length + step].tolist() == ids[:, -1].tolist()

    def test_static_cache_gives_the_same_tokens(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 2])
        settings = {"max_new_tokens": 5, "do_sample": False}
        expected = model.generate(**inputs, **settings)
        assert model.generate(**inputs, **settings, cache_implementation="static").equal(expected)

    def test_beams_with_different_numbers_of_images(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [2, 0, 1])
        settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
        together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        images = inputs["pixel_values"].split([2, 0, 1])
        for row in range(3):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
            pixel_values = {"pixel_values": images[row]} if len(images[row]) else {}
            alone = model.generate(input_ids=ids, **pixel_values, **settings)[0, ids.shape[1] :]
            assert together[row][: len(alone)].tolist() == alone.tolist()

    def test_ways_of_decoding_that_give_the_greedy_tokens(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1])
        input_ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]

        def generate(**settings) -> torch.Tensor:
            return model.generate(**{"max_new_tokens": 8, "do_sample": False, **settings})

        expected = generate(**inputs)
        assert torch.equal(generate(**inputs, prompt_lookup_num_tokens=3), expected)
        assert torch.equal(generate(**inputs, assistant_model=model), expected)
        embeds = {**inputs, "input_ids": None, "inputs_embeds": model.get_input_embeddings()(input_ids)}
        assert torch.equal(generate(**embeds), expected[:, length:])

        first = generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
        cache = {CACHE: first[CACHE]}
        rest = generate(
            input_ids=first.sequences, attention_mask=torch.ones_like(first.sequences), max_new_tokens=4, **cache
        )
        assert torch.equal(rest, expected)

    def test_never_generates_the_image_token(self):
        model = tiny_model()
        with torch.no_grad():  # without suppression, the most likely token at every step
            model.lm_head.weight[:] = 0
            model.lm_head.weight[model.config.image_token_id] = 100 * model.model.language_model.norm.weight
        inputs = tiny_inputs(model.config, [1])
        for settings in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2}):
            output_ids = model.generate(**inputs, **settings, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            assert model.config.image_token_id not in output_ids.tolist()


class TestTraining:
    def test_gradient_checkpointing_recomputes_all_parts_and_keeps_the_gradients(self):
        inputs = tiny_inputs(tiny_config(), [1, 0, 2])
        inputs["labels"] = inputs["input_ids"]

        def gradients(checkpointing: bool):
            model = tiny_model()
            blocks = [
                next(m for m in model.modules() if isinstance(m, FlorenceVLVisionBlock)),
                model.model.vision_tower.encoder.layers[0],
                model.model.language_model.layers[0],
            ]
            inner = [count_calls(b) for b in (blocks[0].channel_block.conv1, blocks[1].fc1, blocks[2].input_layernorm)]
            if checkpointing:
                enable_checkpointing(model)
            model.train()
            model(**inputs).loss.backward()
            return {name: p.grad for name, p in model.named_parameters()}, [len(calls) for calls in inner]

        plain, forwards = gradients(checkpointing=False)
        recomputed, forwards_recomputed = gradients(checkpointing=True)
        assert forwards == [1, 1, 1]
        assert forwards_recomputed == [2, 2, 2]
        assert_close(recomputed, plain)

    def test_gradients_reach_every_parameter(self):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 1])
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        # A bias of the keys shifts all scores of a softmax alike: its gradient is zero up to rounding.
        assert {name for name in without if not name.endswith("k_proj.bias")} == set()


class TestSaveAndLoad:
    def test_auto_classes(self, tmp_path):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 2])
        model.save_pretrained(tmp_path)
        for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            loaded = auto_class.from_pretrained(tmp_path)
            assert type(loaded) is FlorenceVLForConditionalGeneration
            assert_close(loaded(**inputs).logits, model(**inputs).logits)
        base = AutoModel.from_pretrained(tmp_path)
        assert type(base) is FlorenceVLModel
        assert_close(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)

    def test_bfloat16(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model(**tiny_inputs(model.config, [1])).logits.dtype == torch.bfloat16

    def test_tied_head(self, tmp_path):
        text_config = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": True}
        model = tiny_model(text_config=text_config)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight

    @pytest.mark.parametrize(
        "part", ["model.vision_tower", "model.multi_modal_projector", "model.language_model", None]
    )
    def test_offloaded_to_disk(self, part, tmp_path):
        model = tiny_model()
        inputs = tiny_inputs(model.config, [1, 1])
        model.save_pretrained(tmp_path / "model")
        where = {"device_map": "auto", "max_memory": {"cpu": 250_000}}
        if part is not None:
            parts = [f"model.{name}" for name, _ in model.model.named_children()] + ["lm_head"]
            where = {"device_map": dict.fromkeys(parts, "cpu") | {part: "disk"}}
        loaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "model", offload_folder=tmp_path / "offload", **where
        )
        assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
        assert_close(loaded(**inputs).logits, model(**inputs).logits)
        expected = model.generate(**inputs, max_new_tokens=3)
        assert torch.equal(loaded.generate(**inputs, max_new_tokens=3), expected)

    def test_resized_vocabulary(self):
        model = tiny_model()
        model.resize_token_embeddings(120)
        assert model.config.text_config.vocab_size == 120
        assert model(**tiny_inputs(model.config, [1])).logits.shape[-1] == 120


class TestPlans:
    def test_tensor_parallel_plan_reaches_the_language_model_and_the_head(self):
        plan = tiny_model().tp_plan
        assert plan["lm_head"] == "colwise_gather_output"
        assert plan["model.language_model.layers.*.self_attn.q_proj"] == "colwise"
        assert not [name for name in plan if "vision_tower" in name]

    def test_blocks_of_all_parts_are_not_split(self):
        no_split = set(tiny_model()._no_split_modules)
        assert {
            "FlorenceVLVisionBlock",
            "FlorenceVLImageProjection",
            "BartEncoderLayer",
            "LlamaDecoderLayer",
        } <= no_split

    def test_names_that_other_libraries_use(self):
        model = tiny_model()
        assert model.get_encoder("image") is model.model.vision_tower
        assert model.get_decoder() is model.model.language_model
        assert model.get_input_embeddings() is model.model.language_model.embed_tokens
        assert model.get_output_embeddings() is model.lm_head
        assert model.base_model is model.model
        assert model.model.multi_modal_projector is not None

    def test_prompt_tuning_takes_the_embeddings_of_the_language_model(self):
        text_config = tiny_config().text_config.to_dict()
        vocab_size = tiny_config().vision_config.text_config.vocab_size
        model = tiny_model(text_config={**text_config, "vocab_size": vocab_size}, image_token_id=vocab_size - 1)
        tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        assert tuned.word_embeddings is model.get_input_embeddings()
