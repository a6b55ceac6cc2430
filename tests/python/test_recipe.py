"""Recipe: defaults by kind, ordered rules, the spellings of other tools, and errors that name what is wrong."""

import json

import pytest

from lowbit.quantize.recipe import Recipe, parse_rule


def test_defaults_quantize_the_blocks_and_leave_head_embedding_and_the_rest():
    recipe = Recipe(bits=3, group_size=64)
    spec = recipe.for_module("model.layers.0.mlp.up_proj")
    assert (spec.bits, spec.format, spec.group_size, spec.rule) == (3, "int3", 64, None)
    assert recipe.for_module("lm_head", "head") is None
    assert recipe.for_module("model.embed_tokens", "embedding") is None
    assert recipe.for_module("pooler.dense", "other") is None
    recipe = Recipe(head_bits=4, embed_bits=8)
    assert recipe.for_module("lm_head", "head").bits == 4
    assert recipe.for_module("model.embed_tokens", "embedding").bits == 8
    assert Recipe(bits=16).for_module("model.layers.0.mlp.up_proj") is None


def test_the_first_matching_rule_decides():
    recipe = Recipe(rules={r".*\.0\..*": {"bits": 8}, r".*down_proj": {"bits": 2, "group_size": 32}, r".*gate": "skip"})
    assert recipe.for_module("layers.0.down_proj").bits == 8
    spec = recipe.for_module("layers.1.down_proj")
    assert (spec.bits, spec.group_size, spec.rule) == (2, 32, ".*down_proj")
    assert recipe.for_module("layers.1.gate") is None
    assert recipe.for_module("layers.1.up_proj").bits == 4


def test_rules_match_from_the_start_of_the_full_name():
    recipe = Recipe(rules={"mlp": 8})
    assert recipe.for_module("model.layers.0.mlp.up_proj").bits == 4
    assert recipe.for_module("mlp.up_proj").bits == 8


def test_dynamic_prefixes_of_gptqmodel():
    recipe = Recipe(
        rules={r"+:.*\.1\..*": {"bits": 8, "sym": False}, r"-:.*down.*": {}, r".*q_proj": {"desc_act": True}}
    )
    spec = recipe.for_module("layers.1.up_proj")
    assert (spec.bits, spec.symmetric) == (8, False)
    assert recipe.for_module("layers.2.down_proj") is None
    assert recipe.for_module("layers.2.q_proj").order == "act"


def test_a_rule_without_bits_changes_how_but_not_whether():
    recipe = Recipe(rules={".*": {"group_size": 32}})
    assert recipe.for_module("layers.0.up_proj").group_size == 32
    assert recipe.for_module("lm_head", "head") is None
    assert recipe.for_module("pooler", "other") is None


def test_a_rule_can_give_16_bits_or_name_a_format():
    recipe = Recipe(rules={"a": 16, "b": {"format": "int2"}})
    assert recipe.for_module("a") is None
    assert recipe.for_module("b", "other").bits == 2


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("embed_tokens=8", "model.embed_tokens", {"bits": 8}),
        ("self_attn=int3", "model.layers.3.self_attn.q_proj", {"bits": 3}),
        ("layers.1=2:g32", "model.layers.1.mlp.up_proj", {"bits": 2, "group_size": 32}),
        (".*down_proj=8:g64", "model.layers.0.mlp.down_proj", {"bits": 8, "group_size": 64}),
        ("lm_head=skip", "lm_head", "skip"),
        ("-:lm_head=", "lm_head", "skip"),
        ("up_proj=4:asym:rtn:clip", "up_proj", {"bits": 4, "symmetric": False, "method": "rtn", "clip": True}),
        ("(?=.*x)a=g-1", "ax", {"group_size": -1}),
    ],
)
def test_parse_rule(text, name, expected):
    pattern, change = parse_rule(text)
    assert change == expected
    assert Recipe(rules=[text]).rule_for(name) == (pattern, expected)


def test_a_plain_name_matches_whole_parts_only():
    recipe = Recipe(rules=["layers.1=8", "proj=8"])
    for name in ("model.layers.11.mlp.up", "model.layers.0.q_proj", "players.1.up"):
        assert recipe.rule_for(name) == (None, None)


@pytest.mark.parametrize("text", ["embed_tokens", "=8", "a=nine", "a=5", "a=4:8", "a=4:g40", "a="])
def test_parse_rule_refuses(text):
    with pytest.raises(ValueError):
        parse_rule(text)


def test_dict_round_trip_through_json():
    recipe = Recipe(bits=3, group_size=-1, order="act", rules=["lm_head=8:g64", ("-:.*mlp", {})], damp=0.05)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert list(again.rules) == list(recipe.rules)


def test_from_dict_takes_the_names_of_gptq_checkpoints():
    recipe = Recipe.from_dict(
        {"bits": 4, "q_group_size": 64, "sym": False, "desc_act": False, "damp_percent": 0.05, "dynamic": {"-:a": {}}}
    )
    assert (recipe.group_size, recipe.symmetric, recipe.order, recipe.damp) == (64, False, "none", 0.05)
    assert recipe.rules == {"-:a": "skip"}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"bits": 5}, ValueError, "bits: expected one of trit, 2, 3, 4, 8, 16, got 5"),
        ({"bits": "4"}, ValueError, "bits: expected one of trit"),
        ({"bits": None}, TypeError, "bits: expected a number of bits"),
        ({"bits": True}, TypeError, "bits: expected a number of bits"),
        ({"head_bits": 7}, ValueError, "head_bits"),
        ({"embed_bits": 1}, ValueError, "embed_bits"),
        ({"group_size": 40}, ValueError, "group_size: expected a multiple of 16 or -1, got 40"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"order": "best"}, ValueError, "order: expected one of none, act, gar"),
        ({"grids": "stale"}, ValueError, "grids"),
        ({"correction": "best"}, ValueError, "correction: expected one of none, least_squares, got 'best'"),
        ({"rules": {"a": {"correction": True}}}, ValueError, r"rules\['a'\].correction: expected one of none"),
        ({"damp": 0}, ValueError, r"damp: expected a share in \(0, 1\]"),
        ({"damp": float("nan")}, ValueError, "damp"),
        ({"symmetric": 1}, TypeError, "symmetric: expected True or False"),
        ({"true_sequential": "yes"}, TypeError, "true_sequential"),
        ({"method": "awq"}, ValueError, "method"),
        ({"scale_dtype": "float8"}, ValueError, "scale_dtype"),
        ({"activations": "int4"}, ValueError, "activations"),
        ({"rules": {"(": 8}}, ValueError, "is not a regular expression"),
        ({"rules": {"a": {"width": 8}}}, ValueError, "unknown field 'width'"),
        ({"rules": {"a": {"bits": 6}}}, ValueError, r"rules\['a'\].bits"),
        ({"rules": {"a": {"format": "int5"}}}, ValueError, "format: expected trit, int2"),
        ({"rules": {"a": {"bits": 4, "format": "int8"}}}, ValueError, "format"),
        ({"rules": {"a": None}}, TypeError, "expected a width, 'skip' or a mapping"),
        ({"rules": [("a", 8), ("a", 4)]}, ValueError, "given twice"),
        ({"rules": "a=8"}, TypeError, "rules: expected a mapping or a list"),
        ({"rules": [8]}, TypeError, "rules: expected"),
        ({"width": 4}, ValueError, "unknown field 'width'"),
        ({"sym": True, "symmetric": True}, ValueError, "given twice"),
    ],
)
def test_errors_name_the_field(values, error, message):
    with pytest.raises(error, match=message):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    ("group_size", "cols", "expected"), [(128, 256, 128), (128, 96, 96), (128, 128, 128), (-1, 96, 96), (64, 100, 64)]
)
def test_group_size_falls_back_to_the_row(group_size, cols, expected):
    assert Recipe(group_size=group_size).for_module("a").group_size_for(cols) == expected


def test_needs_calibration():
    assert Recipe().needs_calibration
    assert not Recipe(method="rtn").needs_calibration
    assert Recipe(method="rtn", rules={"a": {"method": "gptq"}}).needs_calibration


def test_clipping_is_searched_where_it_helps_unless_told():
    recipe = Recipe(embed_bits=8, rules={"a": 8, "b": {"clip": False}, "c": {"bits": 8, "clip": True}})
    clips = [recipe.for_module(name).clip for name in ("x", "a", "b", "c")]
    assert clips == [True, False, False, True]
    assert recipe.for_module("embed_tokens", "embedding").clip is False
    assert Recipe(bits=3, clip=False).for_module("x").clip is False
    with pytest.raises(TypeError, match="clip: expected True or False"):
        Recipe(clip=1)


def test_ternary_widths():
    for bits in ("trit", 1.6):
        spec = Recipe(bits=bits, symmetric=False).for_module("layers.0.up_proj")
        assert (spec.bits, spec.format, spec.symmetric, spec.clip) == (1.6, "trit", True, True)
    assert Recipe(bits="trit", method="rtn").for_module("layers.0.up_proj").clip is False
    spec = Recipe(bits="trit", method="rtn", group_size=-1, per_tensor=True).for_module("layers.0.up_proj")
    assert (spec.per_tensor, spec.scale_dtype) == (True, "float32")
    recipe = Recipe(rules=["up_proj=trit:g64", "down_proj=trit:tensor:rtn", "gate_proj=8"])
    assert recipe.for_module("layers.0.up_proj").group_size == 64
    assert recipe.for_module("layers.0.down_proj").per_tensor
    assert recipe.for_module("layers.0.gate_proj").format == "int8"
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(ValueError, match="x: per_tensor: expected group_size -1, method rtn"):
        Recipe(bits="trit", per_tensor=True).for_module("x")
    with pytest.raises(ValueError, match="x: method: expected gptq or rtn at 4 bits, got exact"):
        Recipe(bits=4, method="exact").for_module("x")
