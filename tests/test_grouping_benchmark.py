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
    errors = dict.fromkeys(grouping.SCORED, 0.5)
    made = {"groups": [], "start": errors, "errors": errors}

    def row(bed, few, layer, groups, setting, seeds):
        asked.append((groups, seeds))
        if groups == "last":  # another run has written in the meantime
            content = json.loads(path.read_text())
            content["layers"]["layer 9"] = {"seconds_of_pairs": 1.0, "rows": {"pairs": made}}
            path.write_text(json.dumps(content))
        return made

    layer = SimpleNamespace(train=None, held_out=None, pooled=None)
    bed = SimpleNamespace(fitted=SimpleNamespace(attention=lambda: None))
    monkeypatch.setattr(grouping, "load_layer", lambda *given: layer)
    monkeypatch.setattr(grouping, "third_text", lambda *given: None)
    monkeypatch.setattr(grouping, "Bed", lambda *given: bed)
    monkeypatch.setattr(grouping, "sample", lambda *given: None)
    monkeypatch.setattr(grouping, "row", row)
    names = {"pairs": "first", "random 0": "last"}
    monkeypatch.setattr(grouping, "groupings", lambda *given: (names, 20.0))
    monkeypatch.setattr(grouping, "_print", lambda *given: None)
    grouping.main(["--threads", "1", "--layers", "5"])
    assert asked == [("first", 1), ("last", 1)]
    layers = json.loads(path.read_text())["layers"]
    assert list(layers) == ["layer 5", "layer 9"]
    assert layers["layer 5"] == {
        "seconds_of_pairs": 20.0,
        "rows": {"pairs": made, "random 0": made},
    }
    grouping.main(["--threads", "1", "--layers", "5"])
    assert len(asked) == 2


@pytest.mark.parametrize("option", ["--layers", "--seed"])
def test_a_wrong_option_is_one_line(option, capsys):
    with pytest.raises(SystemExit) as error:
        grouping.main([option, "x"])
    assert error.value.code == 2
    assert "error" in capsys.readouterr().err.splitlines()[-1]
