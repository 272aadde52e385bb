"""Symbols, shapes and conventions of the whole package.

========  ==========================  ==========================================
symbol    shape                       meaning
========  ==========================  ==========================================
A1        (n, d_query)                query inputs
A2        (m, d_key)                  key inputs; default A1
A3        (m, d_value)                value inputs; default A1
B         (n, d_out)                  outputs to reproduce
X         (d_query, d_key)            W_Q W_K^T
Y         (d_value, d_out)            W_V (times W_O)
S         (n, m)                      softmax matrix, rows sum to 1
F         (rows, features)            attention features, before the readout
O         (features [+ 1], d_out)     readout: Y, or W_O with its bias as last row
theta     flat                        everything that is not the readout
r         (rows, d_out)               residual F O - B
========  ==========================  ==========================================

* Sums over rows, no factor 1/2, no 1/n: ``L = sum_j w_j ||r_j||^2``.
* ``vec`` is row-major; ``left V right`` is ``(left (x) right) vec V`` for symmetric factors.
* Weights act from the right: ``y = x W + b``.
* The logit scale is part of the queries, so it enters a derivative once for each query.
* The gauge: adding ``u w^T`` to X with ``A2 w`` constant over the keys of a sequence changes no
  softmax. Keys are centred in the metric; ``b_K``, and ``b_V`` beside ``b_O``, are left alone.
"""
