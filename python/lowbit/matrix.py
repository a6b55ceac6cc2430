"""The noun: `PackedMatrix`, a [rows, cols] matrix of low-bit codes in the line layout (docs/formats.md section 1)."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from lowbit import _C, abi
from lowbit import ops as _ops  # noqa: F401  (registers torch.ops.lowbit, which the verbs use while torch compiles)
from lowbit.abi import (
    FLOAT_DTYPES,
    FORMATS,
    SCALE_DTYPES,
    Layout,
    empty_codes,
    format_bits,
    lookup,
    matrix_view,
    normalise_group_size,
)
from lowbit.ternary import weight_quant


class PackedMatrix:
    """W[n, k] = scales[n, k // group_size] * (code[n, k] - zeros[n, k // group_size]).

    Codes have 2, 3, 4 or 8 bits, or are ternary ("trit": 0, 1, 2 for -1, 0, 1, five in a byte, 1.6 bits a weight).

    Attributes:
        codes: uint8 [rows, lines, 64], the line layout. Shared, never copied, by every view of the matrix.
        scales: float32, float16 or bfloat16 [rows, groups], or [rows, 1], or [1, 1] with one group a row.
        zeros: uint8 of the scales' shape, or None: 2**(bits - 1) everywhere (symmetric), 1 for trit.
        perm: int32 [cols] or None; column j of the packed matrix is column perm[j] of the original.
        format: "int2", "int3", "int4", "int8" or "trit".
        rows, cols: out_features (or vocabulary) and in_features.
        group_size: columns that share a scale, a multiple of 16 or `cols`.

    The tensors lie on the CPU or on one NVIDIA GPU, and so do the operands and results of every verb. On a GPU work is
    queued on torch's current stream; `validate` waits for it.

    Raises ValueError or TypeError when shapes, dtypes, devices or (with `validate`) values are not those of a matrix.
    """

    def __init__(self, codes, scales, zeros=None, perm=None, *, format, cols, group_size=-1, validate=True):
        cols = int(cols)
        if cols < 1:
            raise ValueError(f"cols: expected at least 1, got {cols}")
        self.layout = Layout(format, cols, normalise_group_size(int(group_size), cols))
        self._tensors = (codes, scales, zeros, perm)
        self._matrix = matrix_view(*self._tensors, self.layout)
        abi.check_matrix(self._matrix, *self._tensors, self.layout, bool(validate))
        abi.remember(self, codes)

    @staticmethod
    def of(codes: torch.Tensor) -> PackedMatrix | None:
        """The last matrix made over a tensor object as its codes, while there is one: who ties two weights by assigning
        the codes alone ties the matrices."""
        return abi.recall(codes)

    # -- pack ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_float(
        cls,
        weight,
        format,
        group_size=-1,
        *,
        symmetric=True,
        scale_dtype=torch.float16,
        clip=False,
        per_tensor=False,
    ):
        """Round-to-nearest packing of `weight` [rows, cols] (float32, float16 or bfloat16).

        symmetric: one scale 2*max|w|/(2**bits - 1) a group, zero 2**(bits-1); else a zero point a group too.
        clip: search, for each group, the clipping that minimises sum |error|**2.4.
        "trit": the scale of a group is mean|w|, at least 1e-5 (clip: searched as above); but where the nonzero |w| are
        all one number the weights are ternary already and keep it, so packing twice changes nothing.
        Scales are rounded to scale_dtype before codes are chosen.
        per_tensor: one scale for the whole matrix; "trit" with group_size -1 only. Trits and scale are those that
        models are trained with (`lowbit.ternary.weight_quant`, in float32); only then is the scale rounded.
        A weight on a GPU is packed there, into the same bits; the call then waits for its check.
        Raises ValueError on non-finite weights.
        """
        weight = as_tensor(weight, "weight")
        if per_tensor:
            if format != "trit" or group_size not in (-1, weight.shape[-1]) or clip:
                raise ValueError(
                    'per_tensor: expected format "trit", group_size -1 and no clip, '
                    f"got {format!r}, {group_size} and clip={clip}"
                )
            return cls._from_float_per_tensor(weight, scale_dtype)
        bits, rows, cols = format_bits(format), *matrix_shape(weight, "weight")
        group_size = normalise_group_size(int(group_size), cols)
        weight = weight if weight.stride(1) == 1 and weight.stride(0) >= cols else weight.contiguous()
        groups = -(-cols // group_size)
        src_dtype = lookup(FLOAT_DTYPES, weight.dtype, "weight dtype")
        scale_number = lookup(SCALE_DTYPES, scale_dtype, "scale_dtype")
        codes = empty_codes(rows, _C.row_lines(bits, cols), weight.device)
        scales = torch.empty(rows, groups, dtype=scale_dtype, device=weight.device)
        zeros = None if symmetric else torch.empty(rows, groups, dtype=torch.uint8, device=weight.device)
        packed = cls(codes, scales, zeros, format=format, cols=cols, group_size=group_size, validate=False)
        if packed._view.device >= 0:
            require_finite(weight, "weight")
            packed._round(weight, scale_number, bool(clip))
            return packed
        _C.pack_float(
            format=bits,
            rows=rows,
            cols=cols,
            group_size=group_size,
            src=weight.data_ptr(),
            src_dtype=src_dtype,
            src_stride=weight.stride(0) if rows > 1 else cols,
            scale_dtype=scale_number,
            clip=bool(clip),
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            zeros=0 if zeros is None else zeros.data_ptr(),
        )
        return packed

    def _round(self, weight, scale_dtype, clip):
        """Fills a matrix on a GPU with weight [rows, cols], finite, rounded to nearest: the column solver without
        errors to push on, some rows at a time."""
        rows = max(1, (1 << 26) // self.cols)
        for begin in range(0, self.rows, rows):
            part = slice(begin, begin + rows)
            block = weight[part].float().contiguous()
            codes = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
            scales = torch.empty(self.scales[part].shape, device=block.device)
            zeros = None if self.zeros is None else self.zeros[part]
            options = {
                "format": format_bits(self.format),
                "rows": len(block),
                "cols": self.cols,
                "group_size": self.group_size,
                "symmetric": zeros is None,
                "clip": clip,
                "static_grids": False,
                "scale_dtype": scale_dtype,
                "block_size": 0,
            }
            tensors = {"weight": block, "factor": None, "group_index": None, "codes": codes, "scales": scales}
            abi.gptq_solve(options, {**tensors, "zeros": zeros, "loss": None})
            self.scales[part] = scales  # exact: they were rounded to this dtype before codes were chosen
            lines = self.codes[part]
            abi.pack_codes(matrix_view(lines, self.scales[part], zeros, None, self.layout), codes, lines, self.format)

    @classmethod
    def _from_float_per_tensor(cls, weight, scale_dtype):
        lookup(SCALE_DTYPES, scale_dtype, "scale_dtype")
        lookup(FLOAT_DTYPES, weight.dtype, "weight dtype")
        matrix_shape(weight, "weight")
        require_finite(weight, "weight")
        trits, scale = weight_quant(weight.float())
        return cls.from_codes((trits + 1).to(torch.uint8), scale.to(scale_dtype), format="trit")

    @classmethod
    def from_codes(cls, codes, scales, zeros=None, perm=None, *, format, group_size=-1):
        """Packs unpacked codes uint8 [rows, cols], in packed column order, beside their scales (and zeros, perm).

        Raises IndexError for a code above 2**bits - 1 (trit: 2), ValueError or TypeError for anything unfit.
        """
        codes = as_tensor(codes, "codes")
        if codes.dtype != torch.uint8:
            raise TypeError(f"codes: expected dtype torch.uint8, got {codes.dtype}")
        codes = codes.contiguous()
        bits, rows, cols = format_bits(format), *matrix_shape(codes, "codes")
        lines = empty_codes(rows, _C.row_lines(bits, cols), codes.device)
        scales = as_tensor(scales, "scales").contiguous()
        zeros = None if zeros is None else as_tensor(zeros, "zeros").contiguous()
        perm = None if perm is None else as_tensor(perm, "perm").contiguous()
        packed = cls(lines, scales, zeros, perm, format=format, cols=cols, group_size=group_size)
        abi.pack_codes(packed._view, codes, lines, format)
        return packed

    @classmethod
    def from_gptq(cls, qweight, qzeros, scales, g_idx=None, *, bits, group_size, version):
        """Reads a GPTQ checkpoint's tensors (docs/formats.md section 2).

        qweight int32 [cols*bits/32, rows], qzeros int32 [groups, rows*bits/32], scales float [groups, rows], g_idx
        int32 [cols] or None; version 1 stores zero - 1, version 2 the zero. A plain g_idx needs no permutation;
        act-order's becomes `perm`, provided each group has exactly group_size columns. Raises ValueError for shapes or
        values that do not fit, and for a v1 zero word that writers disagree about. Tensors on a GPU are read on the
        CPU, and the matrix then moves to where qweight is.
        """
        device = qweight.device
        qweight, qzeros, scales = qweight.cpu(), qzeros.cpu(), scales.cpu()
        g_idx = None if g_idx is None else g_idx.cpu()
        format = f"int{bits}"
        format_bits(format)
        for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
            if tensor.dtype != torch.int32 or tensor.ndim != 2:
                raise ValueError(
                    f"{name}: expected torch.int32 with 2 dimensions, got {tensor.dtype} {list(tensor.shape)}"
                )
        if qweight.shape[0] * 32 % bits:
            raise ValueError(f"qweight: expected a multiple of {bits} rows of words, got {qweight.shape[0]}")
        rows, cols = qweight.shape[1], qweight.shape[0] * 32 // bits
        group_size = normalise_group_size(group_size, cols)
        groups = -(-cols // group_size)
        for name, tensor, expected in (
            ("scales", scales, [groups, rows]),
            ("qzeros", qzeros, [groups, rows * bits // 32]),
        ):
            if list(tensor.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
        qweight, qzeros = qweight.contiguous(), qzeros.contiguous()
        codes = torch.empty(rows, cols, dtype=torch.uint8)
        zeros = torch.empty(rows, groups, dtype=torch.uint8)
        _C.gptq_read_weight(bits, rows, cols, qweight.data_ptr(), codes.data_ptr())
        _C.gptq_read_zeros(bits, version, rows, groups, qzeros.data_ptr(), zeros.data_ptr())
        perm = None if g_idx is None else perm_from_g_idx(g_idx, cols, group_size)
        codes = codes if perm is None else codes[:, perm.long()]
        zeros = None if bool((zeros == 1 << (bits - 1)).all()) else zeros
        packed = cls.from_codes(codes, scales.t(), zeros, perm, format=format, group_size=group_size)
        return packed.to(device)

    def to_gptq(self, version=2) -> dict[str, torch.Tensor]:
        """The tensors qweight, qzeros, scales and g_idx of a GPTQ checkpoint. Codes and scales are kept exactly.

        Scales of one a row or one a tensor are expanded. The tensors lie on the CPU, also those of a matrix on a GPU.
        Raises ValueError where the format cannot hold the matrix: rows or cols that are not multiples of 32, a zero
        point of 0 in version 1.
        """
        for name, size in (("in_features", self.cols), ("out_features", self.rows)):
            if size % 32:
                raise ValueError(f"{name}: expected a multiple of 32 in a GPTQ checkpoint, got {size}")
        if self.format == "trit":
            raise ValueError('format: expected integer codes in a GPTQ checkpoint, got trit; repack("int2") has them')
        if self._view.device >= 0:
            return self.cpu().to_gptq(version)
        groups = -(-self.cols // self.group_size)
        codes = self.unpack_codes()
        g_idx = torch.arange(self.cols, dtype=torch.int32) // self.group_size
        if self.perm is not None:
            original = torch.empty_like(codes)
            original[:, self.perm.long()] = codes
            order = torch.empty_like(g_idx)
            order[self.perm.long()] = g_idx
            codes, g_idx = original, order
        zeros = self.zeros
        if zeros is None:
            zeros = torch.full_like(self.scales, 1 << (self.bits - 1), dtype=torch.uint8)
        zeros, scales = (t.expand(self.rows, groups).contiguous() for t in (zeros, self.scales))
        qweight = torch.empty(self.cols * self.bits // 32, self.rows, dtype=torch.int32)
        qzeros = torch.empty(groups, self.rows * self.bits // 32, dtype=torch.int32)
        _C.gptq_write_weight(self.bits, self.rows, self.cols, codes.data_ptr(), qweight.data_ptr())
        _C.gptq_write_zeros(self.bits, version, self.rows, groups, zeros.data_ptr(), qzeros.data_ptr())
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales.t().contiguous(), "g_idx": g_idx}

    def repack(self, format) -> PackedMatrix:
        """The same weights in another format that can hold them: ternary codes as "trit" (1.6 bits) or "int2" (2 bits).

        Codes, scales and perm are kept exactly; int2 gets zeros of 1, and shares no memory of codes. Raises ValueError
        when the codes are not ternary, or for other formats.
        """
        if format == self.format:
            return self
        if {format, self.format} != {"trit", "int2"}:
            raise ValueError(
                f'format: expected "trit" or "int2" to repack ternary codes, got {self.format} -> {format}'
            )
        codes = self.unpack_codes()
        if format == "int2":
            zeros = torch.ones(self.scales.shape, dtype=torch.uint8, device=self.device)
            return type(self).from_codes(
                codes, self.scales, zeros, self.perm, format=format, group_size=self.group_size
            )
        if self.zeros is None or not bool((self.zeros == 1).all()):
            raise ValueError("zeros: expected 1 everywhere to repack int2 as trit, got other zero points")
        if int(codes.max()) > 2:
            raise ValueError(f"codes: expected 0, 1 and 2 to repack int2 as trit, got {int(codes.max())}")
        return type(self).from_codes(codes, self.scales, None, self.perm, format=format, group_size=self.group_size)

    def resized(self, rows, new_rows=None, *, clip=False) -> PackedMatrix:
        """The matrix with `rows` rows: its first ones, or all of them and new ones behind. This one is unchanged, and
        codes and scales of the rows that stay are kept bit for bit.

        new_rows: what is appended, float32, float16 or bfloat16 [rows - self.rows, cols], in original column order;
        None: the mean of the rows that are there, each time. They are rounded to nearest into the format, the group
        size, the scale dtype and the order of columns of the matrix, with zeros where it has some (clip: as in
        `from_float`). One scale for the whole matrix ([1, 1]) is kept and new rows are rounded on its grid; ternary
        ones to the nearest of -scale, 0 and scale.
        Raises ValueError for fewer rows than 1, new_rows that do not fit or are not finite, and where the grid of a
        whole matrix does not reach them.
        """
        rows, count = int(rows), int(rows) - self.rows
        if rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        if new_rows is None:
            new_rows = self._mean_row().expand(count, -1) if count > 0 else self.scales.new_empty(0, self.cols)
        new_rows = as_tensor(new_rows, "new_rows")
        if list(new_rows.shape) != [max(count, 0), self.cols]:
            expected = [max(count, 0), self.cols]
            raise ValueError(f"new_rows: expected shape {expected} for {rows} rows, got {list(new_rows.shape)}")
        lookup(FLOAT_DTYPES, new_rows.dtype, "new_rows dtype")
        abi.require_device(new_rows, "new_rows", self._view.device)
        if count == 0:
            return self
        one_scale = self.rows > 1 and self.scales.shape[0] == 1
        keep, parts = min(rows, self.rows), []
        if count > 0:
            require_finite(new_rows, "new_rows")
            ordered = new_rows if self.perm is None else new_rows[:, self.perm.long()]
            parts.append(self._rounded_on_its_grid(ordered) if one_scale else self._rounded_alike(ordered, clip))

        def joined(tensor: str) -> torch.Tensor | None:
            mine = getattr(self, tensor)
            if mine is None:
                return None
            if one_scale:
                return mine.clone()
            return torch.cat([mine[:keep], *(getattr(part, tensor) for part in parts)])

        codes = empty_codes(rows, self.codes.shape[1], self.device)
        codes[:keep] = self.codes[:keep]
        for part in parts:
            codes[keep:] = part.codes
        tensors = (codes, joined("scales"), joined("zeros"), None if self.perm is None else self.perm.clone())
        return self._of_this_layout(*tensors)

    def _of_this_layout(self, codes, scales, zeros, perm=None) -> PackedMatrix:
        layout = self.layout
        options = {"format": layout.format, "cols": layout.cols, "group_size": layout.group_size}
        return type(self)(codes, scales, zeros, perm, **options, validate=False)

    def _mean_row(self) -> torch.Tensor:
        """float32 [1, cols], summed in float64."""
        total = torch.zeros(self.cols, dtype=torch.float64, device=self.device)
        step = max(1, (1 << 22) // self.cols)
        for begin in range(0, self.rows, step):
            total += self.unpack(rows=slice(begin, begin + step)).sum(0, dtype=torch.float64)
        return (total / self.rows).float()[None]

    def _rounded_alike(self, weight, clip) -> PackedMatrix:
        """Rows of their own, columns in packed order."""
        options = {"symmetric": self.zeros is None, "scale_dtype": self.scales.dtype, "clip": clip}
        return type(self).from_float(weight, self.format, self.group_size, **options)

    def _rounded_on_its_grid(self, weight) -> PackedMatrix:
        """Rows under the one scale of the matrix, columns in packed order."""
        scale = float(self.scales)
        zero = int(self.zeros) if self.zeros is not None else 1 if self.format == "trit" else 1 << (self.bits - 1)
        steps = (weight.double() / scale).nan_to_num(0.0, torch.inf, -torch.inf) + zero  # a scale of 0 reaches 0 alone
        top = abi.largest_code(self.format)
        beyond = ((steps < -0.5) | (steps > top + 0.5)).nonzero()
        if len(beyond) and self.format != "trit":
            row, col = beyond[0].tolist()
            low, high = sorted(((-0.5 - zero) * scale, (top + 0.5 - zero) * scale))
            raise ValueError(
                f"new_rows[{row}]: expected values in [{low:g}, {high:g}], which the one scale of the matrix reaches, "
                f"got {float(weight[row, col]):g}"
            )
        codes = steps.round().clamp(0, top).to(torch.uint8)
        scales = self.scales.expand(len(codes), 1)
        zeros = None if self.zeros is None else self.zeros.expand(len(codes), 1)
        return type(self).from_codes(codes, scales, zeros, format=self.format, group_size=self.group_size)

    # -- unpack --------------------------------------------------------------------------------------------------

    def unpack(self, dtype=torch.float32, rows: slice | int | Sequence[int] | torch.Tensor | None = None):
        """Dense [rows, cols] in original column order.

        rows: which of them: a slice of step 1, one row ([1, cols]), or a list or an int32 or int64 tensor of rows
        (of shape [...]: [..., cols]); negative ones count from the end. IndexError: a row that there is not.
        """
        if rows is None or isinstance(rows, slice):
            return abi.unpack(self._view, *row_range(rows, self.rows), dtype)
        ids = torch.as_tensor([rows] if isinstance(rows, int) else rows, device=self.device)
        ids = ids.long() if ids.numel() == 0 else ids
        lookup(abi.ID_DTYPES, ids.dtype, "rows dtype")
        outside = ((ids < -self.rows) | (ids >= self.rows)).flatten().nonzero()
        if len(outside):
            place = int(outside[0])
            found = int(ids.flatten()[place])
            raise IndexError(f"rows[{place}]: expected a row in [-{self.rows}, {self.rows}), got {found}")
        return abi.gather(self._view, ids.where(ids >= 0, ids + self.rows), dtype, "zero")

    def unpack_codes(self, rows: slice | None = None) -> torch.Tensor:
        """uint8 [rows, cols], one code a byte, in packed column order."""
        return abi.unpack_codes(self._view, *row_range(rows, self.rows))

    # -- matmul and gather ---------------------------------------------------------------------------------------

    def matmul(self, x, bias=None, activations="float"):
        """x @ W.T + bias: x [..., cols] float32, float16 or bfloat16 -> [..., rows] of x's dtype.

        activations "float" represents x as 16-bit fixed point per group (docs/numerics.md), "int8" as 8-bit.
        The result does not depend on threads, instruction set or batch size; what of this holds on a GPU, and how to
        have all of it, is told at `lowbit.cuda.batch_invariant`. Anything that speaks DLPack is taken; a NumPy array
        comes back as one. Raises ValueError for operands that do not lie where the matrix does.
        """
        tensor = x if isinstance(x, torch.Tensor) else as_tensor(x, "x")
        bias = bias if bias is None or isinstance(bias, torch.Tensor) else as_tensor(bias, "bias")
        if abi.runs_eagerly(tensor, bias):
            y = abi.matmul(self._view, tensor, bias, activations)
        else:
            layout = self.layout
            y = torch.ops.lowbit.matmul(
                tensor, *self._tensors, bias, layout.format, layout.cols, layout.group_size, activations
            )
        return y.numpy() if type(x).__module__ == "numpy" else y

    def gather(self, ids, dtype=torch.float32, policy="error", out=None, *, padding_id=None):
        """Rows of W: ids int32 or int64 of any shape -> [*ids.shape, cols] in `dtype`, or into `out` of that shape.

        policy: what an id outside [0, rows) does: "error" raises IndexError, "zero" gives zeros, "clamp" the nearest
        row. On a GPU "error" waits for the result; while a CUDA graph is captured nothing can wait, and it is "zero".
        padding_id: a row that comes out as zeros.
        """
        ids = as_tensor(ids, "ids")
        if out is not None or abi.runs_eagerly(ids):
            return abi.gather(self._view, ids, dtype, policy, padding_id, out)
        layout = self.layout
        return torch.ops.lowbit.gather(
            ids, *self._tensors, layout.format, layout.cols, layout.group_size, dtype, policy, padding_id
        )

    def gather_bags(
        self, ids, offsets, mode="sum", dtype=torch.float32, policy="error", *, weights=None, padding_id=None
    ):
        """Sums or means of rows, as nn.EmbeddingBag makes them: ids int32 or int64 [count], offsets int64 [bags + 1],
        not decreasing -> [bags, cols] in `dtype`; bag b is ids[offsets[b]:offsets[b + 1]].

        mode: "sum" or "mean". Rows are summed in float32 in their order. weights: floats [count], taken as float32,
        that rows are multiplied by as they are added (a fused multiply-add); gradients flow to them. padding_id: an id
        that is left out, of the count of a mean too. An empty bag is zeros; what lies outside of ids is cut off.
        policy: as in `gather`, for ids in some bag. Raises IndexError for a bad id, ValueError for offsets that
        decrease (on a GPU such a bag is empty) and shapes that do not fit, NotImplementedError for a weighted mean, as
        torch does.
        """
        ids, offsets = as_tensor(ids, "ids"), as_tensor(offsets, "offsets")
        if weights is not None and not isinstance(weights, torch.Tensor):
            weights = as_tensor(weights, "weights")
        if abi.runs_eagerly(ids, weights):
            return abi.gather_bags(self._view, ids, offsets, dtype, mode, policy, padding_id, weights)
        layout = self.layout
        return torch.ops.lowbit.gather_bags(
            ids,
            offsets,
            *self._tensors,
            layout.format,
            layout.cols,
            layout.group_size,
            dtype,
            mode,
            policy,
            padding_id,
            weights,
        )

    # -- where it is ---------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device, non_blocking=False) -> PackedMatrix:
        """The matrix on another device; itself where it is there already. non_blocking: as in Tensor.to."""

        def moved(tensor):
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        if torch.device(device).type == "cpu" and not self.codes.is_cpu:
            codes = empty_codes(*self.codes.shape[:2]).copy_(self.codes)  # on huge pages
        else:
            codes = moved(self.codes)
        tensors = (codes, *map(moved, self._tensors[1:]))
        if all(map(operator.is_, tensors, self._tensors)):
            return self
        return self._of_this_layout(*tensors)

    def cuda(self, device=None, non_blocking=False) -> PackedMatrix:
        """The matrix on an NVIDIA GPU: the one of that index, or the current one."""
        return self.to(torch.device("cuda", torch.cuda.current_device() if device is None else device), non_blocking)

    def cpu(self) -> PackedMatrix:
        return self.to("cpu")

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def codes(self) -> torch.Tensor:
        return self._tensors[0]

    @property
    def scales(self) -> torch.Tensor:
        return self._tensors[1]

    @property
    def zeros(self) -> torch.Tensor | None:
        return self._tensors[2]

    @property
    def perm(self) -> torch.Tensor | None:
        return self._tensors[3]

    @property
    def format(self) -> str:
        return self.layout.format

    @property
    def bits(self) -> int | float:
        """Width of a code: 2, 3, 4 or 8; 1.6 for five trits in a byte."""
        return 1.6 if self.format == "trit" else FORMATS[self.layout.format]

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def cols(self) -> int:
        return self.layout.cols

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that exist, by the suffix they have in a file: weight, weight_scale, weight_zero, weight_perm."""
        named = {
            "weight": self.codes,
            "weight_scale": self.scales,
            "weight_zero": self.zeros,
            "weight_perm": self.perm,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and perm."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.rows * self.cols)

    def equal(self, other: PackedMatrix) -> bool:
        """Whether every byte of both is the same, wherever they are: layout, codes, scales, zeros and perm."""
        mine, theirs = self.tensors, other.tensors
        return (
            self.layout == other.layout
            and mine.keys() == theirs.keys()
            and all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k].to(self.device)) for k in mine)
        )

    def __repr__(self) -> str:
        details = [f"{self.rows}x{self.cols}", self.format, f"group_size={self.group_size}"]
        details += [name for name in ("zeros", "perm") if getattr(self, name) is not None]
        return f"PackedMatrix({', '.join(details)}, {self.bits_per_weight:.2f} bits/weight)"

    @property
    def _view(self) -> _C.Matrix:
        if self._matrix is None:
            self._matrix = matrix_view(*self._tensors, self.layout)
        return self._matrix

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_matrix": None}  # addresses: a copy makes its own

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        abi.remember(self, self.codes)


def matmul_group(x, matrices, biases=None, activations="float") -> list[torch.Tensor]:
    """[x @ W.T + bias for each matrix]: products of one input, bit for bit those of `PackedMatrix.matmul`, in one call.

    On the CPU what the matrices read alike is prepared once and threads start once, which small products (the keys and
    values of a layer) gain from. x [..., cols] float32, float16 or bfloat16; biases: one for each matrix, or None.
    No gradients. Raises what matmul raises.
    """
    matrices = list(matrices)
    biases = [None] * len(matrices) if biases is None else list(biases)
    if len(biases) != len(matrices):
        raise ValueError(f"biases: expected one for each of {len(matrices)} matrices, got {len(biases)}")
    x = as_tensor(x, "x")
    return abi.matmul_group([w._view for w in matrices], x, biases, activations) if matrices else []


def as_tensor(array, name: str) -> torch.Tensor:
    """A torch tensor over the same memory as anything that speaks DLPack (NumPy, JAX, CuPy arrays)."""
    if not isinstance(array, torch.Tensor):
        if not hasattr(array, "__dlpack__"):
            raise TypeError(f"{name}: expected a tensor or an array that speaks DLPack, got {type(array).__name__}")
        array = torch.from_dlpack(array)
    return array.detach()


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises ValueError with the place of the first of the numbers [rows, cols] that is NaN or infinite."""
    wrong = ~torch.isfinite(tensor)
    if bool(wrong.any()):
        row, col = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}, {col}]: expected a finite number, got {float(tensor[row, col])}")


def matrix_shape(tensor: torch.Tensor, name: str) -> tuple[int, int]:
    if tensor.ndim != 2 or tensor.shape[0] < 1 or tensor.shape[1] < 1:
        raise ValueError(f"{name}: expected shape [rows, cols], at least 1x1, got {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def row_range(rows: slice | None, count: int) -> tuple[int, int]:
    begin, end, step = (rows or slice(None)).indices(count)
    if step != 1:
        raise ValueError(f"rows: expected a slice of step 1, got step {step}")
    return begin, max(begin, end)


def perm_from_g_idx(g_idx: torch.Tensor, cols: int, group_size: int) -> torch.Tensor | None:
    """The stable order that brings the columns of each group together, or None when they already are.

    Negative entries count from the end, as readers of the format agree. Raises ValueError when a group does not have
    exactly group_size columns (the last: what is left), for such a matrix is no PackedMatrix.
    """
    if list(g_idx.shape) != [cols] or g_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"g_idx: expected int32 [{cols}], got {g_idx.dtype} {list(g_idx.shape)}")
    groups = -(-cols // group_size)
    g_idx = torch.where(g_idx < 0, g_idx + groups, g_idx).long()
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(
            f"g_idx: expected groups in [-{groups}, {groups}), got [{int(g_idx.min())}, {int(g_idx.max())}]"
        )
    plain = torch.arange(cols) // group_size
    if torch.equal(g_idx, plain):
        return None
    sizes = torch.bincount(g_idx, minlength=groups)
    expected = torch.bincount(plain, minlength=groups)
    if not torch.equal(sizes, expected):
        bad = int((sizes != expected).nonzero()[0])
        raise ValueError(f"g_idx: expected {int(expected[bad])} columns in group {bad}, got {int(sizes[bad])}")
    return torch.argsort(g_idx, stable=True).to(torch.int32)
