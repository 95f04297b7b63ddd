# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
from florence_vl_hf.serving import ChatSession


def test_image_is_encoded_once_and_turns_are_kept(golden, model, processor):
    encoded = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    session = ChatSession(model, processor, [str(golden.image_path("odd.jpg"))])
    settings = type(model.generation_config)(max_new_tokens=4, do_sample=False)
    answers = [session.answer(question, generation_config=settings) for question in ("What is it?", "Sure?")]
    hook.remove()
    assert encoded == [1]
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]

    # The same without a session, from pixel values.
    inputs = processor.apply_chat_template(
        session.messages[:3], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output_ids = model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(output_ids, skip_special_tokens=True).strip() == answers[1]


def test_without_an_image(model, processor):
    settings = type(model.generation_config)(max_new_tokens=4, do_sample=False)
    answer = ChatSession(model, processor, []).answer("Hello", generation_config=settings)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output_ids = model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(output_ids, skip_special_tokens=True).strip() == answer
