# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""What Transformers' tests expect of a model that is part of Transformers."""

from collections.abc import Iterator

import pytest
from transformers.models.auto import modeling_auto

from florence_vl_hf import FlorenceVLConfig, FlorenceVLForConditionalGeneration, FlorenceVLModel


# Its modules are imported, and their test classes subclassed.
collect_ignore = ["upstream"]


def pytest_configure(config: pytest.Config) -> None:
    # Marks of upstream's mixins.
    for mark in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "is_fsdp_test",
        "is_pipeline_test",
        "is_tensor_parallel_test",
        "is_training_test",
        "order",
        "torch_compile_test",
    ):
        config.addinivalue_line("markers", f"{mark}: of Transformers")


@pytest.fixture(scope="package", autouse=True)
def _tables_of_class_names() -> Iterator[None]:
    """A model of Transformers stands in these tables, which its tests read to know what a class computes."""
    with pytest.MonkeyPatch.context() as patch:
        name = FlorenceVLConfig.model_type
        patch.setitem(modeling_auto.MODEL_MAPPING_NAMES, name, FlorenceVLModel.__name__)
        head = FlorenceVLForConditionalGeneration.__name__
        patch.setitem(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, name, head)
        yield
