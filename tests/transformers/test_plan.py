"""Plans: files, refusals, and the choice within a budget."""

import itertools
import json
import random

import pytest

from attnreg.transformers.calibration import read_tokenizer, read_windows
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.plan import Choice, Plan, Setting, cheapest, parse_layers, read_plan
from attnreg.transformers.sensitivity import choose, choose_even, measure
from attnreg.transformers.task import Options, original_shapes
from tests.transformers.texts import model_folder, write_text

TOML = """
[default]
kv_heads = 1

[layers.0]
kv_heads = 2
head_dim = 4

[layers.2]
"""


def test_toml_and_json_say_the_same(tmp_path):
    (tmp_path / "plan.toml").write_text(TOML)
    content = {"default": {"kv_heads": 1}, "layers": {"0": {"kv_heads": 2, "head_dim": 4}, "2": {}}}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    plan = read_plan(tmp_path / "plan.toml")
    assert plan == read_plan(tmp_path / "plan.json")
    assert plan.default == Setting(kv_heads=1)
    assert plan.layers == {0: Setting(2, None, 4), 2: Setting()}


def test_a_written_plan_is_read_as_it_was(tmp_path):
    path = tmp_path / "plan.toml"
    plans = [
        Plan(Setting(kv_heads=2)),
        Plan(Setting(head_dim=6), {3: Setting(heads=6, kv_heads=3), 1: Setting()}),
        Plan(layers={0: Setting(1)}),
    ]
    for plan in plans:
        path.write_text(plan.toml("made by\na test"))
        assert read_plan(path) == plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the plan is empty"),
        ("kv_heads = 2", "'kv_heads'; expected default and layers"),
        (
            "[default]\nkv_heds = 2",
            "default has 'kv_heds'; expected only kv_heads, heads, head_dim",
        ),
        ("[default]\nkv_heads = 0", "kv_heads = 0; expected a positive integer"),
        ("[default]\nkv_heads = true", "True; expected a positive integer"),
        ("[default]\nkv_heads = 2.0", "2.0; expected a positive integer"),
        ("[layers.first]\nkv_heads = 2", "'first'; expected the number of a layer"),
        ("layers = 3", "layers is no section"),
        ("layers.0 = 3", "layers.0 is 3; expected a section"),
        ("[default", "is not TOML"),
    ],
)
def test_files_that_are_no_plan(tmp_path, text, words):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.toml") as refused:
        read_plan(path)
    assert words in str(refused.value)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_plan(tmp_path / "none.toml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_plan(tmp_path / "bytes")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="a list was given"):
        read_plan(tmp_path / "list.json")


def test_layers():
    assert parse_layers("0,2-4, 7") == {0, 2, 3, 4, 7}
    for text in ("", "a", "1-", "-1", "1,,2"):
        with pytest.raises(ValueError, match="expected numbers from 0"):
            parse_layers(text)
    with pytest.raises(ValueError, match="'4-2'; expected the smaller"):
        parse_layers("4-2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Checkpoint.open(model_folder("llama", tmp_path_factory.mktemp("llama")))


def shapes(checkpoint, plan):
    from attnreg.transformers.adapters import adapter_for

    adapter = adapter_for(checkpoint.config)
    return plan.shapes(adapter, checkpoint.config, original_shapes(checkpoint))


def test_shapes_of_a_plan(llama):
    plan = Plan(Setting(kv_heads=1), {1: Setting(head_dim=6)}, only=frozenset({1, 2}))
    found = [
        (s.heads, s.kv_heads, s.head_dim, len(s.rotary.frequencies)) for s in shapes(llama, plan)
    ]
    assert found == [(4, 2, 8, 4), (4, 2, 6, 3), (4, 1, 8, 4)]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(), "nothing is to be changed"),
        (Plan(Setting(kv_heads=2)), "nothing is to be changed"),
        (Plan(Setting(kv_heads=4)), "layer 0: kv_heads = 4 was given, the original has 2"),
        (Plan(layers={3: Setting(1)}), "layer 3 was given, the model has 3: expected 0 to 2"),
        (Plan(Setting(1), only=frozenset({5})), "layer 5 was given"),
        (Plan(Setting(heads=3)), "layer 0: 2 key/value heads do not divide 3 heads"),
        (Plan(Setting(head_dim=5)), "layer 0: "),
    ],
)
def test_plans_that_do_not_suit_the_model(llama, plan, words):
    with pytest.raises(ValueError, match=r"expected|choose|must be|give") as refused:
        shapes(llama, plan)
    assert words in str(refused.value)


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_within_a_budget_is_the_best_of_all(seed):
    draw = random.Random(seed)
    layers = [
        [
            Choice(i, draw.randrange(1, 9), draw.randrange(20) / 4)
            for i in range(draw.randrange(1, 4))
        ]
        for _ in range(draw.randrange(1, 6))
    ]
    budget = draw.randrange(2, 40)
    fitting = [
        (sum(c.error for c in picks), sum(c.cost for c in picks))
        for picks in itertools.product(*layers)
        if sum(c.cost for c in picks) <= budget
    ]
    found = cheapest(layers, budget)
    if not fitting:
        assert found is None
    else:
        # quarters add without rounding; of equal errors the cheaper
        assert (sum(c.error for c in found), sum(c.cost for c in found)) == min(fitting)


def test_profile_and_choice(llama, tmp_path):
    text = write_text(tmp_path / "text.txt")
    windows = read_windows(text, read_tokenizer(llama.folder), length=16).split(0.25)
    profile = measure(llama, *windows, [], Options(max_iterations=0))
    assert [len(layer) for layer in profile] == [2, 2, 2]
    assert [one.cost for one in profile[0]] == [2 * 2 * 8, 2 * 1 * 8]
    assert all(layer[0].error == 0.0 < layer[1].error < 1.5 for layer in profile)
    errors = [layer[1].error for layer in profile]
    # One layer has to be halved for 5/6 of the cache: the one that loses least.
    chosen = choose(profile, 5 / 6)
    least = errors.index(min(errors))
    assert [bool(one.error) for one in chosen.measured] == [i == least for i in range(3)]
    assert chosen.share == pytest.approx(5 / 6)
    assert chosen.loss == pytest.approx(min(errors) ** 2)
    assert chosen.plan() == Plan(layers={least: Setting(kv_heads=1)})
    assert choose_even(profile, 5 / 6).measured[0].setting == Setting(kv_heads=1)
    assert choose(profile, 0.5).plan() == Plan(Setting(kv_heads=1))
    with pytest.raises(ValueError, match=r"the smallest of these settings keeps 0\.5"):
        choose(profile, 0.4)
    better = measure(llama, *windows, [], Options(max_iterations=3))
    rounding = 1 + 1e-5  # the readout without iterations is solved for once more
    assert all(b[1].error <= rounding * a[1].error for a, b in zip(profile, better, strict=True))
    with pytest.raises(ValueError, match="layer 0 has 2 key/value"):
        measure(llama, *windows, [Setting(kv_heads=2)], Options())
