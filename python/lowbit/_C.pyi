"""The C API of lowbit.h over raw addresses. Use `lowbit.PackedMatrix`.

An address is an int (a tensor's data_ptr(); 0 where lowbit.h allows NULL), a dtype one of the constants below, a format
its width in bits, a stride a number of elements. Nothing here checks that an address is valid. Failures are ValueError,
IndexError (an id, row or code out of range), NotImplementedError (what this build or machine cannot do), MemoryError
and ArithmeticError (data that the solver cannot go on with).
"""

__version__: str
compiler: str

MAX_GROUP: int
F32: int
F16: int
BF16: int
I32: int
I64: int

class Buffer:
    """Zeroed memory, 64-byte aligned and on huge pages where the system gives them, behind the buffer protocol."""

    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Matrix:
    """A view of a matrix: addresses, shapes and where the memory lies, -1 for the CPU or the index of a GPU. Whoever
    makes one keeps the memory alive.

    The verbs of a GPU have the prefix cuda_ and queue their work on a stream of it, 0 being the default one. A plan is
    (kernel, prefers_unpack, workspace_bytes, zeroed_bytes).
    """

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def device(self) -> int: ...
    def __init__(
        self,
        format: int,
        rows: int,
        cols: int,
        group_size: int,
        codes: int,
        scales: int,
        scale_dtype: int,
        scale_rows: int,
        scale_cols: int,
        zeros: int,
        perm: int,
        device: int = -1,
    ) -> None: ...
    def check(self, values: bool) -> None: ...
    def pack_codes(self, codes: int, out: int) -> None: ...
    def unpack_codes(self, begin: int, end: int, out: int) -> None: ...
    def unpack(self, begin: int, end: int, out: int, dtype: int, stride: int) -> None: ...
    def matmul(
        self,
        x: int,
        dtype: int,
        tokens: int,
        x_stride: int,
        bias: int,
        bias_dtype: int,
        y: int,
        y_stride: int,
        activations: int,
    ) -> None: ...
    def gather(
        self, ids: int, id_dtype: int, count: int, policy: int, out: int, out_dtype: int, out_stride: int
    ) -> None: ...
    def gather_bags(
        self,
        ids: int,
        id_dtype: int,
        count: int,
        offsets: int,
        bags: int,
        weights: int,
        mean: bool,
        policy: int,
        padding_id: int,
        out: int,
        out_dtype: int,
        out_stride: int,
    ) -> None: ...
    def cuda_check(self, stream: int, bad: int, workspace: int, workspace_bytes: int) -> None: ...
    def cuda_pack_codes(self, stream: int, codes: int, out: int, first_bad: int) -> None: ...
    def cuda_unpack_codes(self, stream: int, begin: int, end: int, out: int) -> None: ...
    def cuda_unpack(self, stream: int, begin: int, end: int, out: int, dtype: int, stride: int) -> None: ...
    def cuda_matmul_plan(self, tokens: int, dtype: int, activations: int) -> tuple[str, bool, int, int]: ...
    def cuda_matmul(
        self,
        stream: int,
        x: int,
        dtype: int,
        tokens: int,
        x_stride: int,
        bias: int,
        bias_dtype: int,
        y: int,
        y_stride: int,
        activations: int,
        workspace: int,
        workspace_bytes: int,
    ) -> None: ...
    def cuda_gather(
        self,
        stream: int,
        ids: int,
        id_dtype: int,
        count: int,
        policy: int,
        padding_id: int,
        first_bad: int,
        out: int,
        out_dtype: int,
        out_stride: int,
    ) -> None: ...
    def cuda_gather_bags(
        self,
        stream: int,
        ids: int,
        id_dtype: int,
        count: int,
        offsets: int,
        bags: int,
        weights: int,
        mean: bool,
        policy: int,
        padding_id: int,
        first_bad: int,
        out: int,
        out_dtype: int,
        out_stride: int,
    ) -> None: ...

def row_lines(format: int, cols: int) -> int: ...
def pack_float(
    format: int,
    rows: int,
    cols: int,
    group_size: int,
    src: int,
    src_dtype: int,
    src_stride: int,
    scale_dtype: int,
    clip: bool,
    codes: int,
    scales: int,
    zeros: int,
) -> None: ...
def gptq_solve(
    format: int,
    rows: int,
    cols: int,
    group_size: int,
    symmetric: bool,
    clip: bool,
    static_grids: bool,
    scale_dtype: int,
    block_size: int,
    weight: int,
    factor: int,
    group_index: int,
    codes: int,
    scales: int,
    zeros: int,
    loss: int,
) -> None: ...
def cuda_architectures() -> str: ...
def cuda_device_count() -> int: ...
def cuda_describe(device: int) -> dict: ...
def cuda_gptq_workspace(
    format: int,
    rows: int,
    cols: int,
    group_size: int,
    symmetric: bool,
    clip: bool,
    static_grids: bool,
    scale_dtype: int,
    block_size: int,
) -> int: ...
def cuda_gptq_solve(
    device: int,
    stream: int,
    format: int,
    rows: int,
    cols: int,
    group_size: int,
    symmetric: bool,
    clip: bool,
    static_grids: bool,
    scale_dtype: int,
    block_size: int,
    weight: int,
    factor: int,
    group_index: int,
    codes: int,
    scales: int,
    zeros: int,
    loss: int,
    workspace: int,
    workspace_bytes: int,
) -> None: ...
def gptq_read_weight(bits: int, rows: int, cols: int, qweight: int, codes: int) -> None: ...
def gptq_write_weight(bits: int, rows: int, cols: int, codes: int, qweight: int) -> None: ...
def gptq_read_zeros(bits: int, version: int, rows: int, groups: int, qzeros: int, zeros: int) -> None: ...
def gptq_write_zeros(bits: int, version: int, rows: int, groups: int, zeros: int, qzeros: int) -> None: ...
def matmul_group(
    matrices: list[Matrix],
    biases: list[tuple[int, int]],
    ys: list[int],
    x: int,
    dtype: int,
    tokens: int,
    x_stride: int,
    activations: int,
) -> None: ...
def rms_norm(
    x: int, residual: int, weight: int, eps: float, dtype: int, tokens: int, size: int, sum: int, y: int
) -> None: ...
def silu_mul(gate: int, up: int, dtype: int, tokens: int, size: int, y: int) -> None: ...

class DecoderLayer:
    def __init__(
        self,
        matrices: list[Matrix],
        biases: list[tuple[int, int]],
        activations: list[int],
        norms: list[tuple[int, float]],
    ) -> None: ...

class DecoderStack:
    def __init__(self, layers: list[DecoderLayer], heads: list[tuple[int, float]], norm: tuple[int, float]) -> None: ...
    def decode(
        self,
        dtype: int,
        sequences: int,
        x: int,
        y: int,
        past: int,
        cos: int,
        sin: int,
        angle_stride: int,
        caches: list[tuple[int, int, int, int]],
    ) -> None: ...

def cpu_features() -> str: ...
def isa() -> str: ...
def set_isa(isa: str) -> None: ...
def isa_missing(isa: str) -> str | None: ...
def matmul_batching(format: int, activations: int) -> tuple[int, int]: ...
def matmul_sharing(format: int, tokens: int, activations: int) -> int: ...
def set_matmul_blocking(format: int, tiles_from: int, own_digit_bytes: int) -> None: ...
def kernels() -> list[tuple[str, bool]]: ...
def selected_kernel(verb: str, format: int) -> str: ...
def last_kernel(verb: str) -> str: ...
def set_threads(threads: int) -> None: ...
def threads() -> int: ...
def executor() -> str: ...
def read_bandwidth(bytes: int, threads: int) -> float: ...
def multiply_rate(kind: str, threads: int) -> float: ...
def register_torch_kernels(libtorch_cpu: str) -> bool: ...
def keep_error(error: BaseException) -> None: ...
