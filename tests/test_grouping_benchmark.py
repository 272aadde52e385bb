"""The benchmark of groupings: the groups that it draws, and a file that several runs share."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import common, grouping


def test_random_groups_are_partitions_and_do_not_change():
    drawn = [grouping.random_groups(number) for number in range(4)]
    for groups in drawn:
        assert sorted(head for group in groups for head in group) == list(range(12))
        assert [len(group) for group in groups] == [3, 3, 3, 3]
    assert len({str(groups) for groups in drawn}) == 4
    assert drawn == [grouping.random_groups(number) for number in range(4)]


def test_rows_are_kept_and_layers_side_by_side_add_to_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    path, asked = tmp_path / "grouping.json", []
    made = {"groups": [], "start": {}, "errors": {}}

    def run(number, setting, kept, add):
        asked.append((number, kept))
        add("pairs", made, 20.0)
        if path.exists():  # another run writes in the meantime
            content = json.loads(path.read_text())
            content["layers"]["layer 9"] = {"seconds_of_pairs": 1.0, "rows": {"pairs": made}}
            path.write_text(json.dumps(content))
        for name in ("neighbours", "moments", "random 0", "random 1", "random 2", "random 3"):
            add(name, made, 30.0)

    monkeypatch.setattr(grouping, "_run", run)
    monkeypatch.setattr(grouping, "_print", lambda *given: None)
    grouping.main(["--threads", "1", "--layers", "5"])
    layers = json.loads(path.read_text())["layers"]
    assert list(layers) == ["layer 5", "layer 9"]
    assert len(layers["layer 5"]["rows"]) == 7
    assert layers["layer 5"]["seconds_of_pairs"] == 20.0
    grouping.main(["--threads", "1", "--layers", "5", "9"])
    assert asked == [(5, set()), (9, {"pairs"})]  # nothing is begun where nothing is lacking


def test_only_rows_that_are_lacking_are_made(monkeypatch):
    layer = SimpleNamespace(train=None, held_out=None, pooled=None, weights={})
    bed = SimpleNamespace(
        fitted=SimpleNamespace(attention=lambda: None), errors=lambda weights: weights
    )
    fake = {
        "load_layer": lambda *given: layer,
        "third_text": lambda *given: None,
        "Bed": lambda *given: bed,
        "WEIGHTS": (),
        "sample": lambda *given: None,
        "groupings": lambda *given: ({"pairs": "p", "moments": "m"}, 20.0),
        "grouped_start": lambda *given: given[-1],
        "solve_readout": lambda few, model, start: (0.0, start + " solved"),
        "fit": lambda problem, model, init, **bound: SimpleNamespace(parameters=init + " fitted"),
    }
    for name, value in fake.items():
        monkeypatch.setattr(grouping, name, value)
    added = []
    grouping._run(5, grouping.QUICK, {"pairs"}, lambda *given: added.append(given))
    row = {"groups": "m", "start": "m solved", "errors": "m solved fitted"}
    assert added == [("moments", row, 20.0)]


@pytest.mark.parametrize("option", ["--layers", "--seed"])
def test_a_wrong_option_is_one_line(option, capsys):
    with pytest.raises(SystemExit) as error:
        grouping.main([option, "x"])
    assert error.value.code == 2
    assert "error" in capsys.readouterr().err.splitlines()[-1]
