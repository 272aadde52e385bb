"""Text put together anew from spans: its tokens, its bounds, and a conversion with it."""

import itertools
from dataclasses import replace

import pytest

from attnreg.transformers.calibration import Windows, read_tokenizer, special_frame
from attnreg.transformers.convert import convert
from attnreg.transformers.recombination import SPAN, recombined_windows
from tests.transformers.test_convert import QUICK, root, task_of  # noqa: F401
from tests.transformers.texts import contents

CLS, SEP = 1, 2
FRAME = ([CLS], [SEP])


def numbered(count=6, length=100):
    """Windows in which no token comes twice, so that a token tells where it is from."""
    rows = [range(100 + 1000 * i, 100 + 1000 * i + length) for i in range(count)]
    return Windows.of([(CLS, *row, SEP) for row in rows])


def runs(row):
    """Lengths of the stretches in which each token follows the one before it in its window."""
    found = [1]
    for before, after in itertools.pairwise(row[1:-1]):
        if after == before + 1:
            found[-1] += 1
        else:
            found.append(1)
    return found


def test_windows_are_spans_of_others_in_the_same_frame():
    windows = numbered()
    made = recombined_windows(windows, 5100, frame=FRAME, seed=0)
    assert made.tokens == 5100
    assert [len(row) for row in made.ids] == 50 * [102]
    known = {token for row in windows.ids for token in row[1:-1]}
    for row in made.ids:
        assert (row[0], row[-1]) == (CLS, SEP)
        assert set(row[1:-1]) <= known
        lengths = runs(row)
        # By chance a span may follow its own end: then two of them look like one.
        assert all(SPAN[0] <= length <= 2 * SPAN[1] for length in lengths[:-1])
        assert len(lengths) >= 3
    sources = [{token // 1000 for token in row[1:-1]} for row in made.ids]
    assert min(map(len, sources)) > 1


def test_lengths_are_those_of_the_windows_and_the_last_is_cut():
    windows = Windows.of([(CLS, *range(10, 15), SEP), (CLS, *range(20, 40), SEP), (CLS, SEP)])
    made = recombined_windows(windows, 1000, frame=FRAME, seed=1)
    assert {len(row) for row in made.ids[:-1]} == {7, 22}
    assert 998 <= made.tokens <= 1000


def test_draws_follow_the_seed():
    first, again, other = (
        recombined_windows(numbered(), 2000, frame=FRAME, seed=seed) for seed in (3, 3, 4)
    )
    assert first.digest == again.digest != other.digest


def test_refusals():
    with pytest.raises(ValueError, match="2 special tokens: expected at least 3"):
        recombined_windows(numbered(), 2, frame=FRAME, seed=0)
    with pytest.raises(ValueError, match="special tokens only"):
        recombined_windows(Windows.of([(CLS, SEP)]), 100, frame=FRAME, seed=0)


def test_an_encoder_is_fitted_on_recombined_text_too(root, tmp_path):  # noqa: F811
    task = task_of(root, "bert", replace(QUICK, generate=300))
    report = convert(task, tmp_path / "out").report
    frame = special_frame(read_tokenizer(task.checkpoint.folder))
    expected = recombined_windows(task.fit, 300, frame=frame, seed=0)
    assert report["calibration"]["generated"] == expected.facts()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"and on {expected.tokens} tokens of its spans put together anew." in card
    convert(task_of(root, "bert", replace(QUICK, generate=300)), tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
