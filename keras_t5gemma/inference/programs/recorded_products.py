"""Products of a recorded decoding step on a CPU, on all its cores.

PyTorch's library gives a product of a few rows with a matrix of a layer's size to one core. A batch of such products,
which it shares out, is as good: parts of the columns, or of the sum for one row or two, for which a part of the columns
is no faster. Of Small-Small in float32 a product of 512 x 512 with 1, 4 and 16 rows takes 61, 78 and 122 microseconds
on two cores, for 104, 140 and 173. In bfloat16, which another library multiplies, there is nothing to gain.
"""

_PARTS = 4
# Rows up to which the sum is shared out, and up to which a product is left on one core.
_ROWS_FOR_SUMS, _MOST_ROWS = 2, 32
# Weights of a matrix from which it pays to share out, and up to which the library does not by itself.
_FEWEST_WEIGHTS, _MOST_WEIGHTS = 2**17, 2**24


def share_out(module):
    """Rewrites the products of a recorded step, a `torch.fx.GraphModule` of ATen's operations, in place."""
    import torch

    if torch.get_num_threads() == 1:
        return
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.mm.default or node.args[1].op != "get_attr":
            continue
        matrix = getattr(module, node.args[1].target)
        rows = node.meta["val"].shape[0]
        if matrix.dtype == torch.float32 and rows <= _MOST_ROWS and _may_share(matrix):
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_function(product, node.args))
    module.graph.eliminate_dead_code()
    module.recompile()


def _may_share(matrix):
    even = all(size % _PARTS == 0 for size in matrix.shape)
    return even and matrix.is_contiguous() and _FEWEST_WEIGHTS <= matrix.numel() <= _MOST_WEIGHTS


def product(rows, matrix):
    """[M, N] of rows [M, K] and a matrix [K, N] whose sizes four divides, as a batch of four products."""
    import torch

    (count, size), width = rows.shape, matrix.shape[1]
    if count <= _ROWS_FOR_SUMS:
        parts = rows.reshape(count, _PARTS, size // _PARTS).transpose(0, 1)
        return torch.bmm(parts, matrix.view(_PARTS, size // _PARTS, width)).sum(0)
    columns = matrix.view(size, _PARTS, width // _PARTS).transpose(0, 1)
    return torch.bmm(rows.expand(_PARTS, count, size), columns).transpose(0, 1).reshape(count, width)
