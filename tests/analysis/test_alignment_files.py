# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from florence_vl_hf.analysis.alignment_files import format_table, read_pairs


PAIRS = [{"image": "a.png", "caption": "A."}, {"image": "/b.png", "caption": "B\u2028c."}]


class TestReadPairs:
    def test_formats(self, tmp_path):
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "A."}]
        (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
        lines = [json.dumps(pair, ensure_ascii=False) for pair in PAIRS]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        (tmp_path / "llava.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
        expected = [{"image": str(tmp_path / "a.png"), "caption": "A."}, {"image": "/b.png", "caption": "B\u2028c."}]
        assert read_pairs(tmp_path / "pairs.json") == read_pairs(tmp_path / "pairs.jsonl") == expected
        assert read_pairs(tmp_path / "llava.json") == expected[:1]
        assert read_pairs(tmp_path / "llava.json", "images")[0]["image"] == "images/a.png"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "has no list of pairs"),
            ('{"image": "a.png", "caption": "A."}', "has no list of pairs"),
            ("[{]", "cannot be read as JSON"),
            ("[" * 100_000, "cannot be read as JSON"),
            (json.dumps([*PAIRS, {"image": "c.png"}]), "Pair 3 of .* is not an object with `image`"),
            (json.dumps([*PAIRS, {"image": 7, "caption": "A."}]), "Pair 3 of .* is not an object with `image`"),
            (json.dumps([PAIRS[0], {"image": "c.png", "caption": " "}]), "Pair 2 of .* has an empty caption"),
            (json.dumps([{"image": "", "caption": "A."}]), "Pair 1 of .* has an empty image"),
        ],
    )
    def test_errors(self, content, message, tmp_path):
        (tmp_path / "pairs.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_pairs(tmp_path / "pairs.json")
        with pytest.raises(ValueError, match="nowhere.json cannot be read"):
            read_pairs(tmp_path / "nowhere.json")


def test_table():
    names = ("num_channels", "loss", "standard_error", "best_step", "final_loss")
    measures = ("mutual_knn", "linear_cka", "linear_cka_shuffled")
    results = [
        {"features": "ocr", **dict(zip(names, (8, 0.5, 0.01, 7, 0.6), strict=True)), **dict.fromkeys(measures, 0.25)},
        {"features": "image", **dict(zip(names, (8, 0.4, 0.1, 3, 0.7), strict=True)), **dict.fromkeys(measures, 0.5)},
    ]
    settings = {"num_neighbors": 10, "num_images": 101}
    assert format_table({"settings": settings, "constant": 0.8, "results": results}).split("\n")[2:] == [
        "| image | 8 | 0.4000 ± 0.1000 | 3 | 0.7000 | 0.500 | 0.500 | 0.500 |",
        "| ocr | 8 | 0.5000 ± 0.0100 | 7 | 0.6000 | 0.250 | 0.250 | 0.250 |",
        "| without features | 0 | 0.8000 | 0 | | 0.100 | | |",
        "",
    ]
