"""The kernels of contrastive.py: sweeps over tiles of the similarities of some rows and some keys.

    x[i,j] = <q_i, k_j>     l[i,j] = x[i,j] / tau_i + c_j + rho[y_i, y_j]     p[i,j] = exp(l[i,j] - LSE_i) in A(i)
    G[i,j] = dloss/dx[i,j] = negative_i * p[i,j] - positive_i * [j in P(i)] (times sigmoid(LSE_i - x[i,j] / tau_i) for
             a denominator of each positive alone)

A tile of x comes from a matrix product and is never stored. The loop runs over one side, in parts that the shapes
alone decide and that are summed in order: there are no atomics. OPTIONS is a sum of the bits below.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a call has. SELF: keys are the queries, and no row is its own key. LABELS, INDEX: what names the positives.
# The next three say which keys a log-sum-exp runs over; none of them: all that a row sees.
SELF, ALLOWED, BIAS, MARGIN, LABELS, INDEX, WITHOUT_POSITIVES, OTHER_LABEL, SAME_LABEL, OWN = (
    1 << bit for bit in range(10)
)
# The sides of a tile whose gradient a program sums: that of rows, of keys, or of both where they are the same.
QUERY, KEY, BOTH = 1, 2, 3

# Arguments whose value must not be compiled in. The width and the row strides are: whether 16 divides them decides
# how wide the loads are.
RUNTIME_ARGUMENTS = ("n_rows", "n_keys", "n_labels", "allowed_stride", "per_part", "first")


@triton.jit
def _vectors(ptr, index, n, stride, start, width, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """(BLOCK, DEPTH) from the rows `index` of a (n, width) matrix; zeros beyond it."""
    columns = start + tl.arange(0, DEPTH)
    inside = (index < n)[:, None] & (columns < width)[None, :]
    x = tl.load(ptr + index.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    if UPCAST and x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x


@triton.jit
def _products(
    a, b, a_ptr, b_ptr, a_index, b_index, n_a, n_b, a_stride, b_stride, width,
    ACC: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(A, B) products of rows: of a and b if they are WHOLE, else DEPTH columns at a time."""
    x = tl.zeros([a_index.shape[0], b_index.shape[0]], ACC)
    if WHOLE:
        x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION, out_dtype=ACC)
    else:
        for start in range(0, width, DEPTH):
            a_part = _vectors(a_ptr, a_index, n_a, a_stride, start, width, DEPTH, UPCAST)
            b_part = _vectors(b_ptr, b_index, n_b, b_stride, start, width, DEPTH, UPCAST)
            x = tl.dot(a_part, tl.trans(b_part), x, input_precision=PRECISION, out_dtype=ACC)
    return x


@triton.jit
def _row_values(
    p, index, n, AXIS: tl.constexpr, OPTIONS: tl.constexpr, NEEDS_LABEL: tl.constexpr = LABELS | MARGIN,
    INDEX: tl.constexpr = INDEX,
):  # fmt: skip
    """Of rows, along the other axis than AXIS: their number, 1 / tau, label and the index of their positive."""
    inside = index < n
    slope = tl.load(p.inverse_temperature + index, mask=inside, other=0.0)
    # A temperature that makes no sense: reading it would synchronise, a number would look right.
    slope = tl.where(((slope > 0) & (slope < float("inf"))) | ~inside, slope, float("nan"))
    label, positive = index, index
    if OPTIONS & NEEDS_LABEL:
        label = tl.load(p.label + index, mask=inside, other=-1)
    if OPTIONS & INDEX:
        positive = tl.load(p.positive_index + index, mask=inside, other=-1)
    return (
        tl.expand_dims(index, AXIS),
        tl.expand_dims(slope, AXIS),
        tl.expand_dims(label, AXIS),
        tl.expand_dims(positive, AXIS),
    )


@triton.jit
def _refused(label, n_labels, OPTIONS: tl.constexpr, MARGIN: tl.constexpr = MARGIN):
    """Labels that a call on a CPU refuses by an error."""
    return (label < -1) | (label >= n_labels) if OPTIONS & MARGIN else label < -1


@triton.jit
def _poison(
    row, n_keys, n_labels, OPTIONS: tl.constexpr, NEEDS_LABEL: tl.constexpr = LABELS | MARGIN,
    INDEX: tl.constexpr = INDEX, SELF: tl.constexpr = SELF,
):  # fmt: skip
    """NaN for rows whose label or positive makes no sense, as for temperatures; 0 for others."""
    rows, slope, label, positive = row
    refused = rows < 0
    if OPTIONS & NEEDS_LABEL:
        refused = _refused(label, n_labels, OPTIONS)
    if OPTIONS & INDEX:
        own = (positive == rows) if OPTIONS & SELF else refused
        refused = (positive < 0) | (positive >= n_keys) | own
    return tl.sum(tl.where(refused, float("nan"), tl.zeros_like(slope)), axis=1)


@triton.jit
def _key_values(
    p, index, n, AXIS: tl.constexpr, OPTIONS: tl.constexpr, NEEDS_LABEL: tl.constexpr = LABELS | MARGIN,
    BIAS: tl.constexpr = BIAS,
):  # fmt: skip
    """Of keys: their number, label and c."""
    inside = index < n
    label = index
    bias = tl.zeros_like(index).to(p.inverse_temperature.dtype.element_ty)
    if OPTIONS & NEEDS_LABEL:
        label = tl.load(p.key_label + index, mask=inside, other=-1)
    if OPTIONS & BIAS:
        bias = tl.load(p.key_bias + index, mask=inside, other=0.0)
    return tl.expand_dims(index, AXIS), tl.expand_dims(label, AXIS), tl.expand_dims(bias, AXIS)


@triton.jit
def _positives(
    p, row, key, shape, OPTIONS: tl.constexpr, SELF: tl.constexpr = SELF, ALLOWED: tl.constexpr = ALLOWED,
    LABELS: tl.constexpr = LABELS, INDEX: tl.constexpr = INDEX,
):  # fmt: skip
    """Which keys each row sees, and which of them share its label, or are its positive by index."""
    n_rows, n_keys, n_labels, allowed_stride = shape
    rows, slope, label, positive = row
    keys, key_label, bias = key
    seen = (rows < n_rows) & (keys < n_keys)
    if OPTIONS & SELF:
        seen = seen & (rows != keys)
    if OPTIONS & ALLOWED:
        allowed = tl.load(p.allowed + rows.to(tl.int64) * allowed_stride + keys, mask=seen, other=0)
        seen = seen & (allowed != 0)
    same = seen
    if OPTIONS & INDEX:
        same = seen & (positive == keys)
    elif OPTIONS & LABELS:
        same = seen & (label == key_label) & (label >= 0)
    return seen, same


@triton.jit
def _logits(
    p, x, row, key, shape, OPTIONS: tl.constexpr, MARGIN: tl.constexpr = MARGIN,
    OTHERS: tl.constexpr = WITHOUT_POSITIVES | OTHER_LABEL, SAME_LABEL: tl.constexpr = SAME_LABEL,
):  # fmt: skip
    """l, -inf outside A(i); and P(i), if the call has LABELS or INDEX."""
    rows, slope, label, positive = row
    keys, key_label, bias = key
    n_labels = shape[2]
    seen, same = _positives(p, row, key, shape, OPTIONS)
    logits = x * slope + bias
    if OPTIONS & MARGIN:
        known = (label >= 0) & (key_label >= 0) & (label < n_labels) & (key_label < n_labels) & seen
        # 64 bits: the square of the number of labels may need them.
        logits += tl.load(
            p.pair_margin + (label.to(tl.int64) * n_labels + key_label.to(tl.int64)), mask=known, other=0.0
        )
    summed = seen
    if OPTIONS & OTHERS:
        summed = seen & ~same
    if OPTIONS & SAME_LABEL:
        summed = same
    return tl.where(summed, logits, float("-inf")), same


@triton.jit
def _coefficients(
    p, x, row, key, coefficients, index, shape, AXIS: tl.constexpr, OPTIONS: tl.constexpr,
    POSITIVES: tl.constexpr = LABELS | INDEX, NO_POSITIVES: tl.constexpr = OTHER_LABEL | SAME_LABEL,
    OWN: tl.constexpr = OWN,
):  # fmt: skip
    """G, and its part negative_i * p, which flows through the logits to c and rho."""
    n_rows = shape[0]
    inside = index < n_rows
    # The log-sum-exp is 0, not -inf, in a row without a key.
    lse = tl.expand_dims(tl.load(coefficients + index, mask=inside, other=0.0), AXIS)
    negative = tl.expand_dims(tl.load(coefficients + n_rows + index, mask=inside, other=0.0), AXIS)
    logits, same = _logits(p, x, row, key, shape, OPTIONS)
    mass = tl.exp(logits - lse) * negative
    g = mass
    if (OPTIONS & POSITIVES) and not (OPTIONS & NO_POSITIVES):
        pull = tl.expand_dims(tl.load(coefficients + 2 * n_rows + index, mask=inside, other=0.0), AXIS)
        if OPTIONS & OWN:
            pull = pull / (1.0 + tl.exp(x * row[1] - lse))
        g = g - tl.where(same, pull, 0.0)
    return g, mass


@triton.jit
def _log1p(x):
    """log(1 + x) without losing an x far below 1."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def _statistics(
    p,  # Operands
    out_ptr,  # (4, parts, M) log-sum-exp, sum of x over the positives, their number, mean of x under softmax(l)
    n_rows,
    n_keys,
    n_labels,
    width,
    query_stride,
    key_stride,
    allowed_stride,
    per_part,  # keys of a part, a multiple of KEYS
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,  # DEPTH is at least the width
    OPTIONS: tl.constexpr,
    EXPECTED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    POSITIVES: tl.constexpr = LABELS | INDEX,
    NO_POSITIVES: tl.constexpr = OTHER_LABEL | SAME_LABEL,
    CHECKED: tl.constexpr = LABELS | MARGIN,
):
    HAS_POSITIVES: tl.constexpr = (OPTIONS & POSITIVES) != 0 and (OPTIONS & NO_POSITIVES) == 0
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    shape = (n_rows, n_keys, n_labels, allowed_stride)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * per_part
    end = tl.minimum(begin + per_part, n_keys)
    row = _row_values(p, rows, n_rows, 1, OPTIONS)
    q = _vectors(p.query, rows, n_rows, query_stride, 0, width, DEPTH, UPCAST)

    top = tl.full([ROWS], float("-inf"), ACC)
    mass = tl.zeros([ROWS], ACC)
    expected = tl.zeros([ROWS], ACC)
    total = tl.zeros([ROWS], ACC)
    count = tl.zeros([ROWS], ACC)
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = q
        if WHOLE:
            k = _vectors(p.key, keys, n_keys, key_stride, 0, width, DEPTH, UPCAST)
        x = _products(
            q, k, p.query, p.key, rows, keys, n_rows, n_keys, query_stride, key_stride, width, ACC, DEPTH, WHOLE,
            PRECISION, UPCAST,
        )  # fmt: skip
        key = _key_values(p, keys, n_keys, 0, OPTIONS)
        logits, same = _logits(p, x, row, key, shape, OPTIONS)
        if OPTIONS & CHECKED:
            logits += tl.where(_refused(key[1], n_labels, OPTIONS), float("nan"), 0.0)
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # against inf - inf while nothing is there
        e = tl.exp(logits - shift[:, None])
        kept = tl.exp(top - shift)
        mass = mass * kept + tl.sum(e, axis=1)
        if EXPECTED:
            expected = expected * kept + tl.sum(tl.where(logits == float("-inf"), 0.0, e * x), axis=1)
        if HAS_POSITIVES:
            total += tl.sum(tl.where(same, x, 0.0), axis=1)
            count += tl.sum(same.to(ACC), axis=1)
        top = new_top

    inside = rows < n_rows
    plane = tl.num_programs(1).to(tl.int64) * n_rows
    out = out_ptr + tl.program_id(1).to(tl.int64) * n_rows + rows
    poison = _poison(row, n_keys, n_labels, OPTIONS)
    lse = tl.where(top == float("-inf"), 0.0, top) + tl.log(mass) + poison
    tl.store(out, lse, mask=inside)
    if HAS_POSITIVES:
        count = tl.where(poison == poison, count, tl.maximum(count, 1.0))  # or the row would be left out of the loss
        tl.store(out + plane, total, mask=inside)
        tl.store(out + 2 * plane, count, mask=inside)
    if EXPECTED:
        tl.store(out + 3 * plane, tl.where(mass == 0, 0.0, expected / mass), mask=inside)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def _own_terms(
    p, lse_ptr,  # (M,)
    out_ptr,  # (2, parts, M) over the positives: sum of softplus(LSE_i - s) and of its derivative
    n_rows, n_keys, n_labels, width, query_stride, key_stride, allowed_stride, per_part,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, OPTIONS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    shape = (n_rows, n_keys, n_labels, allowed_stride)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * per_part
    end = tl.minimum(begin + per_part, n_keys)
    row = _row_values(p, rows, n_rows, 1, OPTIONS)
    q = _vectors(p.query, rows, n_rows, query_stride, 0, width, DEPTH, UPCAST)
    lse = tl.load(lse_ptr + rows, mask=rows < n_rows, other=0.0)
    loss = tl.where(lse == lse, 0.0, lse)  # NaN, even if no key is found to be a positive
    slope = loss
    lse = lse[:, None]
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = q
        if WHOLE:
            k = _vectors(p.key, keys, n_keys, key_stride, 0, width, DEPTH, UPCAST)
        x = _products(
            q, k, p.query, p.key, rows, keys, n_rows, n_keys, query_stride, key_stride, width, ACC, DEPTH, WHOLE,
            PRECISION, UPCAST,
        )  # fmt: skip
        seen, same = _positives(p, row, _key_values(p, keys, n_keys, 0, OPTIONS), shape, OPTIONS)
        gap = lse - x * row[1]  # -inf in a row without a negative: both terms are 0
        e = tl.exp(-tl.abs(gap))
        loss += tl.sum(tl.where(same, tl.maximum(gap, 0.0) + _log1p(e), 0.0), axis=1)
        slope += tl.sum(tl.where(same, tl.where(gap > 0, 1.0, e) / (1.0 + e), 0.0), axis=1)

    inside = rows < n_rows
    plane = tl.num_programs(1).to(tl.int64) * n_rows
    out = out_ptr + tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(out, loss, mask=inside)
    tl.store(out + plane, slope, mask=inside)


@triton.jit(do_not_specialize=(*RUNTIME_ARGUMENTS, "n_a", "n_b"))
def _gradient(
    p,  # Operands
    coefficients,  # (3, M) log-sum-exp, negative_i, positive_i
    scale_ptr,  # () what to divide G by, so that it fits float16
    extra_ptr,  # (M, D) one more positive of each row, contiguous
    extra_coefficient,  # (M,) dloss/d<q_i, e_i>
    out_ptr,  # (parts, A, D)
    products_ptr,  # (parts, A) sum_j G[i,j] x[i,j]
    key_sums_ptr,  # (parts, A) sum_i dloss/dl[i,j]
    n_rows,
    n_keys,
    n_a,  # the side that the output is of
    n_b,
    n_labels,
    width,
    a_stride,
    b_stride,
    allowed_stride,
    per_part,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,  # columns of the output that a program sums; DEPTH if it is WHOLE
    WHOLE: tl.constexpr,
    ROLE: tl.constexpr,
    OPTIONS: tl.constexpr,
    OUTPUT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    KEY_SUMS: tl.constexpr,
    EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A block of gradients: sum_b G[a,b] k_b for rows, sum_b G[b,a] q_b for keys, and both for rows that are keys."""
    ACC: tl.constexpr = coefficients.dtype.element_ty
    shape = (n_rows, n_keys, n_labels, allowed_stride)
    a_index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * per_part
    end = tl.minimum(begin + per_part, n_b)
    first = tl.program_id(2) * OUT
    a_ptr = p.query if ROLE & 1 else p.key
    b_ptr = p.key if ROLE & 1 else p.query
    a = _vectors(a_ptr, a_index, n_a, a_stride, 0, width, DEPTH, UPCAST)
    if ROLE & 1:
        a_row = _row_values(p, a_index, n_rows, 1, OPTIONS)
    if ROLE & 2:
        a_key = _key_values(p, a_index, n_keys, 1, OPTIONS)
    HALF: tl.constexpr = b_ptr.dtype.element_ty == tl.float16
    scale = tl.load(scale_ptr) if HALF else 1.0

    acc = tl.zeros([ROWS, OUT], ACC)
    products = tl.zeros([ROWS], ACC)
    key_sums = tl.zeros([ROWS], ACC)
    for start in range(begin, end, KEYS):
        b_index = start + tl.arange(0, KEYS)
        b = a
        if WHOLE:
            b = _vectors(b_ptr, b_index, n_b, b_stride, 0, width, DEPTH, UPCAST)
        x = _products(
            a, b, a_ptr, b_ptr, a_index, b_index, n_a, n_b, a_stride, b_stride, width, ACC, DEPTH, WHOLE, PRECISION,
            UPCAST,
        )  # fmt: skip
        g = tl.zeros([ROWS, KEYS], ACC)
        if ROLE & 1:
            b_key = _key_values(p, b_index, n_keys, 0, OPTIONS)
            g, mass = _coefficients(p, x, a_row, b_key, coefficients, a_index, shape, 1, OPTIONS)
            if PRODUCTS:
                products += tl.sum(g * x, axis=1)
        if ROLE & 2:
            b_row = _row_values(p, b_index, n_rows, 0, OPTIONS)
            pulled, mass = _coefficients(p, x, b_row, a_key, coefficients, b_index, shape, 0, OPTIONS)
            g += pulled
            if KEY_SUMS:
                tau = tl.load(p.temperature + b_index, mask=b_index < n_rows, other=0.0)
                key_sums += tl.sum(mass * tau[None, :], axis=1)
        if OUTPUT:
            if not WHOLE:
                b = _vectors(b_ptr, b_index, n_b, b_stride, first, width, OUT, UPCAST)
            if HALF:
                g = g / scale
            g = g.to(b_ptr.dtype.element_ty).to(b.dtype)  # rounded in the interpreter too
            acc = tl.dot(g, b, acc, input_precision=PRECISION, out_dtype=ACC)

    place = tl.program_id(1).to(tl.int64) * n_a + a_index
    inside = a_index < n_a
    if OUTPUT:
        if HALF:
            acc *= scale
        columns = first + tl.arange(0, OUT)
        if EXTRA:
            if tl.program_id(1) == 0:
                e = _vectors(extra_ptr, a_index, n_rows, width, first, width, OUT, False)
                acc += tl.load(extra_coefficient + a_index, mask=inside, other=0.0)[:, None] * e.to(ACC)
        out = out_ptr + place[:, None] * width + columns[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])
    if tl.program_id(2) == 0:
        if PRODUCTS:
            tl.store(products_ptr + place, products, mask=inside)
        if KEY_SUMS:
            tl.store(key_sums_ptr + place, key_sums, mask=inside)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def _pair_margin_gradient(
    p, coefficients, row_order, row_bounds,  # rows in the order of their labels, and where each label begins
    key_order, key_bounds,
    out_ptr,  # (L, L)
    n_rows, n_keys, n_labels, width, query_stride, key_stride, allowed_stride, first,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, OPTIONS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One pair of labels, counted from `first`: the sum of dloss/dl over rows of the one and keys of the other."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    shape = (n_rows, n_keys, n_labels, allowed_stride)
    pair = tl.program_id(0).to(tl.int64) + first
    label, key_label = pair // n_labels, pair % n_labels
    row_end = tl.load(row_bounds + label + 1).to(tl.int32)
    key_begin = tl.load(key_bounds + key_label).to(tl.int32)
    key_end = tl.load(key_bounds + key_label + 1).to(tl.int32)
    total = tl.zeros([ROWS], ACC)
    for row_start in range(tl.load(row_bounds + label).to(tl.int32), row_end, ROWS):
        places = row_start + tl.arange(0, ROWS)
        rows = tl.load(row_order + places, mask=places < row_end, other=n_rows).to(tl.int32)
        row = _row_values(p, rows, n_rows, 1, OPTIONS)
        tau = tl.load(p.temperature + rows, mask=rows < n_rows, other=0.0)
        for key_start in range(key_begin, key_end, KEYS):
            places = key_start + tl.arange(0, KEYS)
            keys = tl.load(key_order + places, mask=places < key_end, other=n_keys).to(tl.int32)
            x = _products(
                tau, tau, p.query, p.key, rows, keys, n_rows, n_keys, query_stride, key_stride, width, ACC, DEPTH,
                False, PRECISION, UPCAST,
            )  # fmt: skip
            key = _key_values(p, keys, n_keys, 0, OPTIONS)
            g, mass = _coefficients(p, x, row, key, coefficients, rows, shape, 1, OPTIONS)
            total += tau * tl.sum(mass, axis=1)
    tl.store(out_ptr + pair, tl.sum(total, axis=0))
