"""The roofline: counts against torch's counter and hand counts, traffic, replay, precisions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop

from attnreg.operations import cholesky
from attnreg.roofline import Sizes, measure, precision
from attnreg.roofline.kernels import make_kernels
from attnreg.roofline.measure import (
    INDEFINITE,
    SQUARE,
    STREAM_BYTES,
    as_vector,
    measure_kernel,
)
from attnreg.roofline.precision import matmul_precision
from attnreg.roofline.replay import Replay
from attnreg.roofline.trace import ENTRYWISE, REDUCTIONS, trace

CPU = torch.device("cpu")
SIZES = Sizes(16, 4, 2, 3, 20, newton_dim=3, newton_length=40)
NAMES = ("features", "JVP", "VJP", "Gauss-Newton", "Hessian", "mini-batch", "Newton step")
MULTIPLY = {"mm", "bmm", "addmm", "baddbmm", "mv", "linalg_cholesky_ex", "cholesky_solve"}
# No arithmetic on numbers of the data: memory, layouts, choices and tests.
MOVE = {"_to_copy", "_unsafe_view", "_local_scalar_dense", "alias", "arange", "cat", "clone"}
MOVE |= {"copy", "detach", "diagonal", "empty", "eq", "expand", "fill", "gt", "index", "index_put"}
MOVE |= {"index_select", "lift_fresh", "new_empty", "new_zeros", "ones_like", "permute", "select"}
MOVE |= {"slice", "split", "split_with_sizes", "squeeze", "t", "trace", "transpose"}
MOVE |= {"triu_indices", "unbind", "unsqueeze", "view", "where", "zero", "zeros", "zeros_like"}
MOVE |= {"scalar_tensor", "empty_like", "new_empty_strided", "_reshape_alias", "split_copy"}


@pytest.fixture(autouse=True)
def small_roofs(monkeypatch):
    monkeypatch.setitem(SQUARE, "cpu", 64)
    monkeypatch.setitem(STREAM_BYTES, "cpu", 1 << 16)


def kernels(dtype=torch.float32, sizes=SIZES):
    return {kernel.name: kernel for kernel in make_kernels(sizes, dtype, "cpu", 0)}


def count(kernel):
    """Operations that the package counts in one run, and what torch says that it executed."""
    before = sum(kernel.operations.as_dict().values())
    executed = trace(kernel.run, kernel.reads)
    return sum(kernel.operations.as_dict().values()) - before, executed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counted_products_are_those_of_torchs_counter(name, dtype):
    kernel = kernels(dtype)[name]
    counted, executed = count(kernel)
    # Torch's counter knows addmm and baddbmm, but leaves out those that add in place.
    aten = torch.ops.aten
    in_place = {aten.addmm_: addmm_flop.__wrapped__, aten.baddbmm_: baddbmm_flop.__wrapped__}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        kernel.run()
    products = sum(product.flops for product in executed.products)
    assert products == counter.get_total_flops() > 0
    beside = 0
    if name == "Newton step":  # torch counts neither the factor, the solve nor products of vectors
        size = SIZES.newton_dim**2
        beside = cholesky(size) + 2 * (2 * size**2)
        assert executed.flops == products + cholesky(size)
    assert counted == products + beside


@pytest.mark.parametrize("name", NAMES)
def test_all_arithmetic_is_known(name):
    _, executed = count(kernels()[name])
    assert executed.names <= MULTIPLY | MOVE | set(ENTRYWISE) | set(REDUCTIONS)


def test_hand_count_of_entrywise_operations():
    s, n, d, h, g = SIZES.sequences, SIZES.length, SIZES.dim, SIZES.heads, SIZES.kv_heads
    e = d // h
    entries, rows, query = s * h * n * n, s * n, (d + 1) * d  # weights and bias of the queries
    found = {name: count(kernel)[1].entrywise for name, kernel in kernels().items()}
    # Softmax 5 an entry; the weights of the queries times the logit scale.
    assert found["features"] == 5 * entries + query
    # S o dZ and its row sums; minus rowsum o F (2 a feature); the scale again.
    assert found["JVP"] == 2 * entries + 2 * rows * d + query
    # Minus rowsum(U o F), times S: 2 an entry; U o F summed: 2 a feature; the sum of the
    # queries' gradients for the bias, scaled and added; gradients of heads added to zero.
    added = rows * (2 * g * e)
    assert found["VJP"] == 2 * entries + 2 * rows * d + rows * d + d + added
    # The two, the change of the readout negated and the product doubled.
    theta = query + 2 * d * g * e
    negated = (d + 1) * d
    assert found["Gauss-Newton"] == found["JVP"] + found["VJP"] + negated + theta


class Touched(TorchDispatchMode):
    """Tensors from outside that a piece of code meets, by storage."""

    def __init__(self):
        super().__init__()
        self.outside, self.made = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and place(tensor) not in self.made:
                self.outside.setdefault(place(tensor), tensor)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and place(tensor) not in self.outside:
                self.made.add(place(tensor))
        return result


def place(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_operands_are_all_that_is_read(name):
    kernel = kernels()[name]
    with Touched() as touched:
        kernel.run()
    own = {place(tensor) for tensor in (*kernel.reads, *kernel.writes)}
    assert {place(tensor) for tensor in kernel.reads} <= set(touched.outside)
    rest = [t for at, t in touched.outside.items() if at not in own]
    # Only matrices that no row enters: Gram matrix, the readout's normal matrix and, of the dense
    # step, what its weights are to be like.
    d, k = SIZES.dim, SIZES.newton_dim
    small = {(), (d, d), (d + 1, d + 1), (k, k), (k * k,)}
    assert {tuple(tensor.shape) for tensor in rest} <= small


def test_hand_count_of_the_least_traffic():
    s, n, d, h, g = SIZES.sequences, SIZES.length, SIZES.dim, SIZES.heads, SIZES.kv_heads
    rows, e = s * n, d // h
    theta = (d + 1) * d + 2 * d * g * e
    inputs = rows * d  # of queries, keys and values: the same
    kept = s * h * n * n + rows * (d + 2 * g * e)
    features = rows * (d + 1)
    found = {name: kernel.bytes for name, kernel in kernels().items()}
    assert found["features"] == 4 * (inputs + theta + features + kept)
    assert found["JVP"] == 4 * (inputs + kept + features + theta + rows * d)
    assert found["VJP"] == found["JVP"]
    assert found["Gauss-Newton"] == 4 * (inputs + kept + features + (d + 1) * d + 2 * theta)
    assert kernels(torch.float64)["JVP"].bytes == 2 * found["JVP"]


@pytest.mark.parametrize("name", NAMES)
def test_replay_runs_the_products_of_the_trace(name):
    executed = trace(kernels()[name].run)
    again = trace(Replay(executed.calls))
    assert [call.flops for call in again.calls] == [call.flops for call in executed.calls]
    layouts = [[(o.shape, o.stride) for o in (p.left, p.right)] for p in executed.products]
    assert layouts == [[(o.shape, o.stride) for o in (p.left, p.right)] for p in again.products]
    assert again.entrywise == 0


def test_replay_is_where_the_trace_was():
    def body():
        a = torch.ones(3, 4, device="meta")
        return torch.addmm(torch.ones(3, 3, device="meta"), a, a.mT)

    again = trace(Replay(trace(body).calls))
    (product,) = again.products
    assert product.left.device == product.right.device == torch.device("meta")


def test_persistent_factors_are_read_where_they_are():
    matrix = torch.ones(4, 4)
    executed = trace(lambda: (matrix + 0.0) @ matrix.mT, [matrix])
    (product,) = executed.products
    assert product.left.tensor is None
    assert product.right.tensor.data_ptr() == matrix.data_ptr()
    assert product.right.stride == (1, 4)


# ---------------------------------------------------------------------- precision


def rounded(a, b):
    """The product of rounded factors, rounded, by loops over rows in float64."""
    a, b = a.bfloat16().double(), b.bfloat16().double()
    return torch.stack([(row[:, None] * b).sum(0) for row in a])


FORMS = {
    "mm": (lambda c, a, b: torch.mm(a, b), (0.0, 1.0)),
    "mm, out": (lambda c, a, b: torch.mm(a, b, out=c), (0.0, 1.0)),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=2.0, alpha=-1.0), (2.0, -1.0)),
    "addmm, out": (lambda c, a, b: torch.addmm(c, a, b, out=torch.empty(5, 7)), (1.0, 1.0)),
    "addmm_": (lambda c, a, b: c.addmm_(a, b, beta=0.5, alpha=3.0), (0.5, 3.0)),
    "bmm": (lambda c, a, b: torch.bmm(a[None], b[None])[0], (0.0, 1.0)),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c[None], a[None], b[None])[0], (1.0, 1.0)),
    "baddbmm_": (lambda c, a, b: c[None].baddbmm_(a[None], b[None])[0], (1.0, 1.0)),
}


@pytest.mark.parametrize("form", FORMS)
def test_bf16_rounds_factors_and_result(form):
    generator = torch.Generator().manual_seed(0)
    c, a, b = (torch.randn(s, generator=generator) for s in ((5, 7), (5, 6), (6, 7)))
    product, (run, (beta, alpha)) = rounded(a, b), FORMS[form]
    expected = beta * c.double() + alpha * product
    with matmul_precision("bf16", CPU):
        found = run(c, a, b)
    assert found.dtype == torch.float32
    # The result is rounded too: 8 bits of it, that is 2^-8 where |product| is below its next power.
    bound = abs(alpha) * 2.0**-8 * product.abs() + 1e-6
    assert bool(((found - expected).abs() <= bound).all())
    assert not torch.allclose(found.double(), beta * c + alpha * (a.double() @ b.double()))


def test_precision_leaves_float64_alone_and_comes_back():
    a = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    with matmul_precision("bf16", CPU):
        assert torch.equal(a @ a, torch.mm(a, a))
        inside = a.float() @ a.float()
    assert torch.equal(a @ a, torch.mm(a, a))
    assert not torch.equal(inside, a.float() @ a.float())
    with pytest.raises(KeyError), matmul_precision("bf16", CPU):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(a.float() @ a.float(), torch.mm(a.float(), a.float()))


def test_tf32_is_set_where_there_is_one_and_float32_always_means_float32(monkeypatch):
    with pytest.raises(ValueError, match="tf32 needs a CUDA device"), matmul_precision("tf32", CPU):
        pass
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(precision, "_has_tf32", lambda device: True)
    with matmul_precision("tf32", CPU):
        assert torch.get_float32_matmul_precision() == "high"
        with matmul_precision("float32", CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


# ---------------------------------------------------------------------- measurement


def test_errors_are_those_of_the_precision():
    errors = {}
    for name, dtype in (
        ("float64", torch.float64),
        ("float32", torch.float32),
        ("bf16", torch.float32),
    ):
        option = "bf16" if name == "bf16" else "float32"
        found = measure(SIZES, dtype=dtype, precision=option, repeats=1)
        errors[name] = {kernel.name: kernel.error for kernel in found.kernels}
    for name in NAMES[:-1]:
        assert errors["float64"][name] == 0.0
        # Some roundings of 6e-8 (float32) and 4e-3 (bfloat16) in sums of a few dozen terms.
        assert 1e-8 < errors["float32"][name] < 1e-5
        assert 1e-3 < errors["bf16"][name] < 5e-2
    assert errors["float64"]["Newton step"] == 0.0
    assert 1e-8 < errors["float32"]["Newton step"] < 1e-3  # times the Hessian's condition


def test_an_indefinite_matrix_is_named():
    kernel = kernels()["Newton step"]

    def step():
        torch.linalg.eigh(torch.eye(2))
        return kernel.run()

    odd = type(kernel)("odd", step, kernel.reads, kernel.writes, kernel.operations)
    reference = as_vector(kernel.run())
    assert measure_kernel(odd, reference, "float32", CPU, 1).note == INDEFINITE
    assert measure_kernel(kernel, reference, "float32", CPU, 1).note == ""


def test_the_measurement_adds_up():
    told = []
    found = measure(SIZES, repeats=2, observe=lambda *step: told.append(step))
    assert [kernel.name for kernel in found.kernels] == list(NAMES)
    assert [done for _, done, _ in told] == list(range(2 * len(NAMES)))
    assert {total for *_, total in told} == {2 * len(NAMES)}
    for kernel in found.kernels:
        assert kernel.rate * kernel.seconds == pytest.approx(kernel.gemm_operations)
        assert kernel.gemm_rate * kernel.gemm_seconds == pytest.approx(kernel.gemm_operations)
        assert kernel.intensity == kernel.gemm_operations / kernel.bytes
        assert kernel.share > 0
        # A dense step's solve and products with vectors are no matrix products.
        assert sum(kernel.operations.values()) == pytest.approx(kernel.gemm_operations, rel=0.01)
    assert found.peak > 0 < found.bandwidth
    again = measure(SIZES, repeats=1)
    for one, other in zip(found.kernels, again.kernels, strict=True):
        assert (one.gemm_operations, one.bytes, one.error) == (
            other.gemm_operations,
            other.bytes,
            other.error,
        )


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ({"dim": 0}, {}, "dim is 0; expected a positive number"),
        ({"dim": 10, "heads": 4}, {}, "heads=4 does not divide dim=10"),
        ({"heads": 4, "kv_heads": 3}, {}, "kv_heads=3 does not divide heads=4"),
        ({"newton_dim": 32, "newton_length": 32}, {}, "newton_length is 32"),
        ({"dim": 8, "sequences": 2, "length": 4}, {}, "2 x 4 rows; expected more than dim=8"),
        ({}, {"repeats": 0}, "repeats is 0"),
        ({}, {"precision": "fp8"}, "precision is 'fp8'; expected one of float32, tf32, bf16"),
        ({}, {"precision": "bf16", "dtype": torch.float64}, "bf16 is for float32 data"),
        ({}, {"precision": "tf32"}, "tf32 needs a CUDA device"),
        ({}, {"device": "nowhere"}, "device 'nowhere' cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        measure(Sizes(**arguments), **options)
