"""What blocks do to each pixel alone: layer norm, bias and GELU, residual, and their gradients.

Images are seen as matrices (rows, channels), a row for a pixel, with unit stride along channels.
These ops write to memory that is there, and nothing is recorded of them: they are steps of
``ced_block`` and ``lr_ced_block``, between the products of a library. Vectors and sums (``norm``,
``bias``, ``scale``, ``keep``, ``grad_*`` of parameters) are contiguous and in the accumulation
dtype: float64 for float64, else float32. GELU is the exact one, ``x Phi(x)``. Row i belongs to
image ``(first + i) // pixels``.
"""

from __future__ import annotations

from fastfuse.ops.define import COMPILED, Op

__all__ = ["LINEAR_SCHEMAS", "MLP_SCHEMAS", "SCHEMAS"]

SCHEMAS = (
    # out = [skip +] [GELU](LN(x)) over channels, the bracketed parts on demand
    "layer_norm_into(Tensor(a!) out, Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor? skip, bool gelu) -> ()",
    # the gradients of LN, or of GELU after LN: grad_x = ..., grad_weight += ..., grad_bias += ...
    "layer_norm_backward_into(Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias, "
    "Tensor grad_output, Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool gelu) "
    "-> ()",
    # out = GELU(hidden + bias); out may be hidden
    "bias_gelu_into(Tensor(a!) out, Tensor hidden, Tensor bias) -> ()",
    # grad *= GELU'(hidden + bias); out = GELU(hidden + bias); grad_bias += the sum of grad's rows;
    # out may be hidden
    "bias_gelu_backward_into(Tensor(a!) grad, Tensor(b!) out, Tensor(c!) grad_bias, Tensor hidden, "
    "Tensor bias) -> ()",
    # out = x + keep[image] * scale * (product + bias)
    "residual_into(Tensor(a!) out, Tensor x, Tensor product, Tensor bias, Tensor? scale, "
    "Tensor? keep, SymInt pixels, SymInt first) -> ()",
    # out = keep[image] * grad, unless there is no keep; sums += the sum of those rows
    "residual_backward_into(Tensor(a!) out, Tensor(b!) sums, Tensor grad, Tensor? keep, "
    "SymInt pixels, SymInt first) -> ()",
)

for _schema in SCHEMAS:
    _name = _schema.partition("(")[0]
    Op(_schema, kernels={"cpu": COMPILED, "triton": f"fastfuse.ops.pointwise.triton:{_name}"})

# On GPUs, where products are not a library's: the steps above behind the products before them.
LINEAR_SCHEMAS = (
    # out = GELU(x weight^T + bias); kept = x weight^T
    "linear_gelu_into(Tensor(a!) out, Tensor(b!)? kept, Tensor x, Tensor weight, Tensor bias) "
    "-> ()",
    # out = skip + keep[image] * scale * (x weight^T + bias)
    "linear_residual_into(Tensor(a!) out, Tensor skip, Tensor x, Tensor weight, Tensor bias, "
    "Tensor? scale, Tensor? keep, SymInt pixels, SymInt first) -> ()",
    # with h = x weight^T + bias, or x + bias: grad_hidden = grad grad_weight^T * GELU'(h);
    # activated = GELU(h); grad_bias += the sum of grad_hidden's rows
    "linear_gelu_backward_into(Tensor(a!) grad_hidden, Tensor(b!) activated, Tensor(c!) grad_bias, "
    "Tensor grad, Tensor grad_weight, Tensor x, Tensor? weight, Tensor bias) -> ()",
)

for _schema in LINEAR_SCHEMAS:
    _name = _schema.partition("(")[0]
    Op(_schema, kernels={"triton": f"fastfuse.ops.pointwise.linear:{_name}"})

# On CPUs, where the policy says so: the steps above with both products between them, a tile of
# pixels at a time. Weights are contiguous, in the accumulation dtype.
MLP_SCHEMAS = (
    # with n = LN(inputs), or inputs: kept = n W1^T; out = x + keep[image] * scale *
    # (GELU(kept + b1) W2^T + b2); out may be inputs
    "mlp_into(Tensor(a!) out, Tensor(b!)? kept, Tensor x, Tensor inputs, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
    "Tensor fc2_bias, Tensor? scale, Tensor? keep, SymInt pixels) -> ()",
    # with g = keep[image] * grad, a = GELU(h) and gh = (scale * g) W2 * GELU'(h): the gradient of
    # inputs, which may be over them; grad_fc1_weight = gh^T n, grad_fc2_weight = g^T a without the
    # scale; biases' are the sums of gh and g
    "mlp_backward_into(Tensor(a!) grad_inputs, Tensor(b!)? grad_norm_weight, "
    "Tensor(c!)? grad_norm_bias, Tensor(d!)? grad_fc1_weight, Tensor(e!) grad_fc1_bias, "
    "Tensor(f!)? grad_fc2_weight, Tensor(g!) grad_fc2_bias, Tensor grad, Tensor inputs, "
    "Tensor? kept, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor fc1_weight, "
    "Tensor fc1_bias, Tensor fc2_weight, Tensor? scale, Tensor? keep, SymInt pixels) -> ()",
)

for _schema in MLP_SCHEMAS:
    Op(_schema, kernels={"cpu": COMPILED})
