"""Every input that is refused, and that the message says what was given and expected."""

import math

import numpy as np
import pytest
import torch

from attnreg.problem import AttentionProblem

NAN, INF = math.nan, math.inf


def ones(*shape, dtype=torch.float64):
    return torch.ones(*shape, dtype=dtype)


def having(tensor, value, *place):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def mask_without(*places, n=3, m=3):
    mask = torch.ones(n, m, dtype=torch.bool)
    for place in places:
        mask[place] = False
    return mask


A, B = ones(3, 2), ones(3, 1)
PAIR = {"A1": [ones(3, 2), ones(4, 2)], "B": [ones(3, 1), ones(4, 1)]}
SQUARE = {"A1": ones(2, 3, 2), "B": ones(2, 3, 1)}

CASES = {
    # types
    "list of numbers": ({"A1": [[1.0, 2.0]]}, "A1[0] is of type list; expected a NumPy array or"),
    "number": ({"A1": 3.0}, "A1 is of type float; expected a NumPy array or torch tensor"),
    "nothing": ({"B": None}, "B is of type NoneType; expected a NumPy array or torch tensor"),
    "text": ({"A1": "A1"}, "A1 is of type str; expected a NumPy array or torch tensor"),
    "sparse": ({"A1": A.to_sparse()}, "A1 is sparse or on the meta device; expected a dense"),
    "meta": ({"A1": A.to("meta")}, "A1 is sparse or on the meta device; expected a dense tensor"),
    "masked array": (
        {"A1": np.ma.masked_equal(np.ones((3, 2)), 0)},
        "A1 is a NumPy masked array; expected a plain one: fill it first",
    ),
    # dtypes
    "integers": ({"A1": A.long()}, "A1 has dtype int64; expected float32 or float64: convert"),
    "half": ({"B": B.half()}, "B has dtype float16; expected float32 or float64: convert it"),
    "bfloat16": ({"A2": A.bfloat16()}, "A2 has dtype bfloat16; expected float32 or float64"),
    "booleans": ({"A1": A.bool()}, "A1 has dtype bool; expected float32 or float64"),
    "complex": ({"A1": A.cfloat()}, "A1 has dtype complex64; expected float32 or float64"),
    "objects": ({"A1": np.ones((3, 2), object)}, "A1 has dtype object; expected float32 or"),
    "calendar": ({"A1": np.ones((3, 2), "M8[s]")}, "A1 has dtype datetime64[s]; expected float32"),
    "half array": ({"B": np.ones((3, 1), np.float16)}, "B has dtype float16; expected float32 or"),
    "extended": ({"A1": np.ones((3, 2), np.longdouble)}, "expected float32 or float64: convert"),
    "integer weights": ({"weights": np.ones(3, int)}, "weights has dtype int64; expected float32"),
    "mixed": ({"B": B.float()}, "B has dtype float32 and A1 has float64; expected one dtype"),
    "mixed list": (
        {"A1": [A, A], "B": [B, B.float()]},
        "B[1] has dtype float32 and A1 has float64; expected one dtype: convert one of them",
    ),
    # values
    "nan": (
        {"A1": having(A, NAN, 1, 0)},
        "A1 holds 1 non-finite value(s), the first nan at [1, 0]",
    ),
    "inf": ({"B": having(B, -INF, 2)}, "B holds 1 non-finite value(s), the first -inf at [2, 0]"),
    "nan in A2": ({"A2": having(A, NAN)}, "A2 holds 6 non-finite value(s), the first nan at"),
    "nan in A3": ({"A3": having(A, NAN, 0)}, "A3 holds 2 non-finite value(s), the first nan at"),
    "nan in a batch": (
        {**SQUARE, "A1": having(ones(2, 3, 2), INF, 1, 2, 0)},
        "A1 holds 1 non-finite value(s), the first inf at [1, 2, 0]; expected finite numbers",
    ),
    "nan in a list": (
        {**PAIR, "B": [ones(3, 1), having(ones(4, 1), NAN, 3)]},
        "B[1] holds 1 non-finite value(s), the first nan at [3, 0]; expected finite numbers",
    ),
    # shapes
    "one dimension": ({"A1": ones(3)}, "A1 has shape (3,); expected 2 dimension(s) for one"),
    "four dimensions": ({"A1": ones(1, 1, 3, 2)}, "A1 has shape (1, 1, 3, 2); expected 2 dim"),
    "batch in a list": (
        {"A1": [ones(1, 3, 2)], "B": [B]},
        "A1[0] has shape (1, 3, 2); expected 2 dimension(s), as it is one sequence of a list",
    ),
    "no rows": ({"A1": ones(0, 2), "B": ones(0, 1)}, "A1 is empty: its shape is (0, 2); expected"),
    "no columns": ({"B": ones(3, 0)}, "B is empty: its shape is (3, 0); expected at least one row"),
    "no keys": ({"A2": ones(0, 2), "A3": ones(0, 2)}, "A2 is empty: its shape is (0, 2)"),
    "no sequences": ({"A1": [], "B": []}, "A1 is an empty list; expected at least one sequence"),
    "empty batch": ({"A1": ones(0, 3, 2)}, "A1 is empty: its shape is (0, 3, 2); expected"),
    "empty sequence": (
        {"A1": [A, ones(0, 2)], "B": [B, ones(0, 1)]},
        "A1[1] is empty: its shape is (0, 2); expected at least one row and column",
    ),
    "rows of B": ({"B": ones(4, 1)}, "B has 4 row(s) and A1 has 3 in sequence 0; expected equal"),
    "rows of B in a list": (
        {**PAIR, "B": [ones(3, 1), ones(3, 1)]},
        "B has 3 row(s) and A1 has 4 in sequence 1; expected equal numbers",
    ),
    "rows of A3": (
        {"A2": ones(4, 2), "A3": ones(5, 2)},
        "A3 has 5 row(s) and A2 has 4 in sequence 0; expected equal numbers",
    ),
    "rows of A3 without A2": (
        {"A3": ones(5, 2)},
        "A3 has 5 row(s) and A2 has 3 in sequence 0; expected equal numbers",
    ),
    "A3 needed": (
        {"A2": ones(4, 2)},
        "A3 is not given, and A1 (its default) has 3 row(s) where A2 has 4; give A3",
    ),
    "columns of A1": (
        {**PAIR, "A1": [ones(3, 2), ones(4, 3)]},
        "A1 has sequences of 2 and 3 columns; expected one number of columns",
    ),
    "columns of B": (
        {**PAIR, "B": [ones(3, 1), ones(4, 2)]},
        "B has sequences of 1 and 2 columns; expected one number of columns",
    ),
    "structure": (
        {**SQUARE, "B": [ones(3, 1), ones(3, 1)]},
        "B is a list of 2 sequence(s) and A1 is a batch of 2 sequence(s); expected the same",
    ),
    "batch and matrix": (
        {**SQUARE, "B": B},
        "B is one sequence and A1 is a batch of 2 sequence(s); expected the same for both",
    ),
    "number of sequences": (
        {**PAIR, "A2": [ones(3, 2)]},
        "A2 is a list of 1 sequence(s) and A1 is a list of 2 sequence(s); expected the same",
    ),
    # weights
    "negative weight": ({"weights": having(ones(3), -0.5, 1)}, "weights holds -0.5; expected numb"),
    "nan weight": ({"weights": having(ones(3), NAN, 1)}, "weights holds 1 non-finite value(s)"),
    "zero weights": ({"weights": 0 * ones(3)}, "weights holds only zeros; expected at least one"),
    "too many weights": ({"weights": ones(4)}, "weights has 4 row(s) and A1 has 3 in sequence 0"),
    "weights of a batch": (
        {**SQUARE, "weights": ones(3)},
        "weights is one sequence and A1 is a batch of 2 sequence(s); expected the same",
    ),
    # masks
    "unknown mask": ({"mask": "causl"}, "mask is 'causl'; expected 'causal', an array, a list"),
    "twice causal": ({"mask": ("causal", "causal")}, "mask is ['causal', 'causal']; expected"),
    "three parts": (
        {"mask": ("causal", mask_without(), mask_without())},
        "mask is ['causal', 'Tensor', 'Tensor']; expected 'causal', an array, a list with one",
    ),
    "mask of a number": ({"mask": 1.0}, "mask is of type float; expected a NumPy array or torch"),
    "integer mask": (
        {"mask": mask_without().int()},
        "mask has dtype int32; expected bool, float64",
    ),
    "mask of another dtype": ({"mask": ones(3, 3).float()}, "mask has dtype float32 and A1 has"),
    "mask with nan": ({"mask": having(ones(3, 3), NAN, 0, 0)}, "mask holds nan or +inf; expected"),
    "mask with inf": ({"mask": having(ones(3, 3), INF, 0, 0)}, "mask holds nan or +inf; expected"),
    "half mask": ({"mask": ones(3, 3).half()}, "mask has dtype float16; expected float32 or"),
    "no masks": ({"mask": []}, "mask is an empty list; expected at least one sequence"),
    "mask shape": (
        {"mask": mask_without(n=3, m=4)},
        "mask has shape (3, 4) for sequence 0; expected (queries, keys) = (3, 3)",
    ),
    "mask of one row": ({"mask": ones(3)}, "mask has shape (3,); expected 2 dimension(s) for one"),
    "number of masks": (
        {**SQUARE, "mask": torch.ones(3, 3, 3, dtype=torch.bool)},
        "mask is given for 3 sequence(s); expected 2, or one matrix for all",
    ),
    "one mask for different lengths": (
        {**PAIR, "mask": mask_without()},
        "mask has shape (3, 3) for sequence 1; expected (queries, keys) = (4, 4)",
    ),
    "empty window": (
        {"mask": ("causal", 0)},
        "mask is causal with a window of 0 key(s); expected at least 1",
    ),
    "two windows": ({"mask": ("causal", 2, 3)}, "mask is ['causal', 2, 3]; expected 'causal'"),
    "window of truth": ({"mask": ("causal", True)}, "mask"),
    "row masked in its window": (
        {"mask": ("causal", 1, mask_without((1, 1)))},
        "mask besides 'causal' and its window of 1 key(s) forbids every key to row 1 of",
    ),
    "causal cross-attention": (
        {"A2": ones(4, 2), "A3": ones(4, 2), "mask": "causal"},
        "mask is 'causal', and sequence 0 has 3 queries and 4 keys; expected equal numbers",
    ),
    "masked row": (
        {"mask": mask_without((1,))},
        "mask forbids every key to row 1 of sequence 0; expected at least one visible key",
    ),
    "masked row, additive": (
        {"mask": having(ones(3, 3), -INF, 2)},
        "mask forbids every key to row 2 of sequence 0; expected at least one visible key",
    ),
    "masked row of a list": (
        {**PAIR, "mask": [mask_without(), mask_without((3,), n=4, m=4)]},
        "mask forbids every key to row 3 of sequence 1; expected at least one visible key",
    ),
    "masked row of weight 0": (
        {"mask": mask_without((1,)), "weights": having(ones(3), 0, 1)},
        "mask forbids every key to row 1 of sequence 0; expected at least one visible key",
    ),
    "row masked by causal and array": (
        {"mask": ("causal", mask_without((0, 0)))},
        "mask besides 'causal' forbids every key to row 0 of sequence 0; expected at least one",
    ),
    "later row masked by causal and array": (
        {"mask": ("causal", mask_without((1, 0), (1, 1)))},
        "mask besides 'causal' forbids every key to row 1 of sequence 0; expected at least one",
    ),
    "row masked in a batch by causal and array": (
        {**SQUARE, "mask": ("causal", torch.stack([mask_without(), mask_without((0, 0))]))},
        "mask besides 'causal' forbids every key to row 0 of sequence 1; expected at least one",
    ),
    # settings
    "zero scale": ({"scale": 0}, "scale is 0; expected a finite number above 0"),
    "negative scale": ({"scale": -1.0}, "scale is -1.0; expected a finite number above 0"),
    "nan scale": ({"scale": NAN}, "scale is nan; expected a finite number above 0"),
    "text scale": ({"scale": "1"}, "scale is '1'; expected a finite number above 0"),
    "negative ridge": ({"ridge_x": -1e-9}, "ridge_x is -1e-09; expected a finite number of at"),
    "infinite ridge": ({"ridge_y": INF}, "ridge_y is inf; expected a finite number of at least 0"),
    "no ridge": ({"ridge_x": None}, "ridge_x is None; expected a finite number of at least 0"),
    "many ridges": ({"ridge_x": ones(2)}, "expected a finite number of at least 0"),
    "true ridge": ({"ridge_x": True}, "ridge_x is True; expected a finite number of at least 0"),
    "complex ridge": ({"ridge_y": 1j}, "ridge_y is 1j; expected a finite number of at least 0"),
    "huge ridge": ({"ridge_y": 10**400}, "expected a finite number of at least 0"),
    "nan centre": ({"center": {"X": having(A, NAN, 0, 0)}}, "center['X'] holds 1 non-finite value"),
    "centre dtype": ({"center": {"X": A.float()}}, "center['X'] has dtype float32 and A1 has"),
    "centre type": ({"center": {"X": 0.0}}, "center['X'] is of type float; expected a NumPy array"),
    "centre not a mapping": ({"center": A}, "center is of type Tensor; expected a mapping from"),
    "centre name": ({"center": {1: A}}, "center has the name 1; expected parameter names such as"),
    "device": ({"device": "nowhere"}, "device is 'nowhere'; expected a torch device such as 'cpu'"),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES)
def test_refused(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        AttentionProblem(**{"A1": A, "B": B, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ACCEPTED = {
    "one row and column": {"A1": ones(1, 1), "B": ones(1, 1)},
    "zero inputs": {"A1": 0 * A, "B": 0 * B},
    "tiny inputs": {"A1": 1e-8 * A},
    "large inputs": {"A1": 1e4 * A},
    "some weights are zero": {"weights": having(ones(3), 0, 0)},
    "causal, first key only": {"mask": ("causal", mask_without((2, 1), (2, 2), (1, 1)))},
    "causal hides what is forbidden": {"mask": ("causal", mask_without((0, 1), (0, 2)))},
    "numbers of other kinds": {"scale": np.float32(2), "ridge_x": torch.tensor(1), "ridge_y": 3},
    "tuple of sequences": {"A1": (A, A), "B": (B, B)},
    "device by name": {"device": "cpu"},
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(change):
    problem = AttentionProblem(**{"A1": A, "B": B, **change})
    assert problem.gram_key.isfinite().all()
    assert math.isfinite(problem.relative_error(1.0))
