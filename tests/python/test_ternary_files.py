"""Ternary matrices in the layouts of others: byte for byte against the gguf package and plain-Python readings of
docs/formats.md section 4, and GGUF files that are damaged or malicious."""

import random
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.checkpoint.gguf import HEADER_LIMIT, GgufFile, write_gguf
from lowbit.checkpoint.ternary_blocks import BLOCKS, decode, decode_i2_s, encode, pack_rows, unpack_rows
from lowbit.checkpoint.ternary_matrix import TernaryMatrix

UNUSED = (1, 20, 40, 60, 79, 99, 119, 138, 158, 178, 197, 217, 237)
LLAMA = {"general.architecture": "llama"}


def random_trits(rows, cols, seed=0):
    return torch.randint(-1, 2, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def matrix(rows, cols, scale=0.03125, seed=0):
    return TernaryMatrix(random_trits(rows, cols, seed), torch.tensor([[scale]]))


def half(*values):
    return struct.pack(f"<{len(values)}e", *values)


def tensor_of(*rows):
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)


# ---- plain readings of the formats, one weight at a time ----


def digit(byte, place):
    """Digit `place` (0 the most significant) of a byte, as docs/formats.md decodes it, less 1."""
    rest = byte
    for _ in range(place + 1):
        value, rest = (3 * rest) >> 8, (3 * rest) & 255
    return value - 1


def plain_tq1_0(block):
    weights = [None] * 256
    for m in range(32):
        for n in range(5):
            weights[32 * n + m] = digit(block[m], n)
    for m in range(16):
        for n in range(5):
            weights[160 + 16 * n + m] = digit(block[32 + m], n)
    for j in range(4):
        for n in range(4):
            weights[240 + 4 * n + j] = digit(block[48 + j], n)
    return weights, struct.unpack("<e", bytes(block[52:]))[0]


def plain_tq2_0(block):
    weights = [None] * 256
    for j in (0, 32):
        for m in range(32):
            for n in range(4):
                weights[128 * (j // 32) + 32 * n + m] = (block[j + m] >> (2 * n) & 3) - 1
    return weights, struct.unpack("<e", bytes(block[64:]))[0]


def plain_ptq1_0(block):
    weights = [None] * 128
    for m in range(16):
        for n in range(5):
            weights[16 * n + m] = digit(block[m], n)
    for m in range(8):
        for n in range(5):
            weights[80 + 8 * n + m] = digit(block[16 + m], n)
    for h in range(2):
        for n in range(4):
            weights[120 + 2 * n + h] = digit(block[24 + h], n)
    return weights, struct.unpack("<e", bytes(block[26:]))[0]


def plain_iq1_bn(row, cols):
    weights = []
    for begin in range(2, 2 + cols // 64 * 13, 13):
        block = row[begin : begin + 13]
        for i in range(4):
            weights += [digit(block[3 * i + k], 4 - j) for k in range(3) for j in range(5)]
            weights.append(digit(block[12], 4 - i))
    return weights, struct.unpack("<e", bytes(row[:2]))[0]


PLAIN = {"TQ1_0": plain_tq1_0, "TQ2_0": plain_tq2_0, "PTQ1_0": plain_ptq1_0}
SIZES = {"TQ1_0": (256, 54), "TQ2_0": (256, 66), "PTQ1_0": (128, 28)}


def byte_of(digits):
    """The byte of up to five digits, the first the most significant, absent ones 0."""
    q = sum(d * 3 ** (4 - p) for p, d in enumerate(digits))
    return (256 * q + 242) // 243


def random_block(format, generator, scale=0.5):
    """Bytes that a writer of the format could have made."""
    five = [byte_of([generator.randrange(3) for _ in range(5)]) for _ in range(64)]
    four = [byte_of([generator.randrange(3) for _ in range(4)]) for _ in range(4)]
    two = [sum(generator.randrange(3) << shift for shift in (0, 2, 4, 6)) for _ in range(64)]
    payload = {"TQ1_0": five[:48] + four, "TQ2_0": two, "PTQ1_0": five[:24] + four[:2]}[format]
    return bytes(payload) + half(scale)


# ---- the digits ----


def test_a_byte_holds_five_digits_and_thirteen_bytes_are_never_made():
    made = {byte_of([q // 3 ** (4 - p) % 3 for p in range(5)]): q for q in range(243)}
    assert sorted(set(range(256)) - made.keys()) == list(UNUSED)
    for byte, q in made.items():
        assert [digit(byte, p) + 1 for p in range(5)] == [q // 3 ** (4 - p) % 3 for p in range(5)]
    for byte in UNUSED:
        assert [digit(byte, p) for p in range(5)] == [digit(byte - 1, p) for p in range(5)]


@pytest.mark.parametrize(
    ("format", "place", "digits"), [("TQ1_0", 0, 5), ("TQ1_0", 47, 5), ("TQ1_0", 51, 4), ("PTQ1_0", 23, 5)]
)
def test_every_byte_value_is_read_or_refused(format, place, digits):
    size, nbytes = SIZES[format]
    made = {byte_of([q // 3 ** (4 - p) % 3 for p in range(digits)]) for q in range(243)}
    assert len(made) == 3**digits
    for byte in range(256):
        block = bytearray([byte_of([1] * 5)] * (48 if size == 256 else 24))
        block += bytes([byte_of([1] * 4)] * (4 if size == 256 else 2)) + half(0.5)
        block[place] = byte
        assert len(block) == nbytes
        expected, _ = PLAIN[format](block)
        if byte in made:
            assert decode(format, tensor_of(block), size).trits[0].tolist() == expected
            continue
        message = f"data: expected a byte that five ternary digits give, got {byte} at row 0, block 0, byte {place} "
        with pytest.raises(ValueError, match=message):
            decode(format, tensor_of(block), size)
        assert decode(format, tensor_of(block), size, canonicalise=True).trits[0].tolist() == expected


@pytest.mark.parametrize("place", [2, 13, 14])
def test_every_byte_value_of_iq1_bn_is_read_or_refused(place):
    for byte in range(256):
        row = bytearray(half(0.5) + bytes([128] * 12 + [byte_of([0, 1, 1, 1, 1])]))
        row[place] = byte
        expected, _ = plain_iq1_bn(row, 64)
        if byte in UNUSED or (place == 14 and digit(byte, 0) != -1):
            with pytest.raises(ValueError, match=f"got {byte} at row 0, block 0, byte {place - 2} "):
                decode("IQ1_BN", tensor_of(row), 64)
            found = decode("IQ1_BN", tensor_of(row), 64, canonicalise=True)
        else:
            found = decode("IQ1_BN", tensor_of(row), 64)
        assert found.trits[0].tolist() == expected
        assert found.scales.tolist() == [[0.5]]


# ---- blocks ----


@pytest.mark.parametrize("format", PLAIN)
def test_blocks_are_read_as_the_format_says(format):
    generator = random.Random(1)
    size, nbytes = SIZES[format]
    assert (BLOCKS[format].size, BLOCKS[format].nbytes) == (size, nbytes)
    rows = [[random_block(format, generator) for _ in range(3)] for _ in range(5)]
    found = decode(format, tensor_of(*(b"".join(row) for row in rows)), 3 * size)
    expected = [[t for block in row for t in PLAIN[format](block)[0]] for row in rows]
    assert found.trits.tolist() == expected
    assert found.scales.tolist() == [[0.5]]


def test_rows_of_iq1_bn_are_read_as_the_format_says():
    generator = random.Random(2)
    rows = []
    for scale in (0.5, 0.25, 0.125):
        blocks = [
            [byte_of([generator.randrange(3) for _ in range(5)]) for _ in range(12)]
            + [byte_of([0] + [generator.randrange(3) for _ in range(4)])]
            for _ in range(3)
        ]
        rows.append(half(scale) + bytes(byte for block in blocks for byte in block))
    found = decode("IQ1_BN", tensor_of(*rows), 192)
    assert found.trits.tolist() == [plain_iq1_bn(row, 192)[0] for row in rows]
    assert found.scales.tolist() == [[0.5], [0.25], [0.125]]


def test_a_row_of_zeros_in_iq1_bn_has_no_trits():
    # Its writer compares weights with half of the row's maximum: 0 < 0 fails, so zeros become +1, with the scale 0.
    zeros = half(0) + bytes([byte_of([2] * 5)] * 12 + [byte_of([0, 2, 2, 2, 2])])
    other = half(0.5) + bytes([byte_of([2] * 5)] * 12 + [byte_of([0, 2, 2, 2, 2])])
    found = decode("IQ1_BN", tensor_of(zeros, other), 64)
    assert found.trits.tolist() == [[0] * 64, [1] * 64]
    assert found.scales.tolist() == [[0.5]]


@pytest.mark.parametrize("scale", [0.03125, 0.0371, 1e-7, 60000.0])
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (17, 768), (33, 256)])
@pytest.mark.parametrize("format", ["TQ1_0", "TQ2_0"])
def test_bytes_equal_those_of_the_gguf_package(format, shape, scale):
    ours = TernaryMatrix(random_trits(*shape), torch.tensor([[scale]]))
    ours.trits[0, :256] = 0
    ours.trits[-1, -256:] = torch.tensor([1, -1, 0, 1]).repeat(64).to(torch.int8)
    kind = gguf.GGMLQuantizationType[format]
    theirs = quants.quantize(ours.unpack().numpy(), kind)
    written = encode(format, ours)
    assert written.dtype == torch.uint8
    assert np.array_equal(written.numpy(), theirs)
    read = decode(format, torch.from_numpy(theirs), shape[1])
    assert torch.equal(read.trits, ours.trits)
    assert read.scales.tolist() == [[torch.tensor(scale).half().item()]]
    assert np.array_equal(read.unpack().numpy(), quants.dequantize(theirs, kind))


@pytest.mark.parametrize("format", ["TQ1_0", "TQ2_0"])
def test_bytes_equal_those_of_the_gguf_package_whatever_shares_a_scale(format):
    trits = random_trits(6, 1024, seed=3)
    trits[2, 256:512] = 0
    trits[4] = 0
    kind = gguf.GGMLQuantizationType[format]
    generator = torch.Generator().manual_seed(4)
    for columns, group_size in ((1, -1), (4, 256), (2, 512)):
        scales = torch.rand(6, columns, generator=generator).add(0.01).half().float()
        ours = TernaryMatrix(trits, scales, group_size)
        theirs = quants.quantize(ours.unpack().numpy(), kind)
        assert np.array_equal(encode(format, ours).numpy(), theirs)
        read = decode(format, torch.from_numpy(theirs), 1024)
        assert torch.equal(read.unpack(), ours.unpack())
        assert read.group_size == (1024 if columns == 1 else 256)
        assert list(read.scales.shape) == [6, 1 if columns == 1 else 4]


@pytest.mark.parametrize("format", ["TQ1_0", "TQ2_0"])
def test_a_block_of_zeros_has_no_scale_and_no_say(format):
    zeros = matrix(2, 512, seed=5)
    zeros.trits[0] = 0
    zeros.trits[1, 256:] = 0
    written = encode(format, zeros)
    blocks = written.view(2, 2, -1)
    fill = [0x55] * 64 if format == "TQ2_0" else [128] * 48 + [127] * 4
    for block in (blocks[0, 0], blocks[0, 1], blocks[1, 1]):
        assert block.tolist() == [*fill, 0, 0]
    assert decode(format, written, 512).equal(zeros)
    nothing = TernaryMatrix(torch.zeros(2, 512, dtype=torch.int8), torch.tensor([[0.25]]))
    read = decode(format, encode(format, nothing), 512)
    assert not read.trits.any()
    assert read.scales.tolist() == [[1.0]]


@pytest.mark.parametrize("format", PLAIN)
def test_unequal_scales_are_kept_row_by_row_or_block_by_block(format):
    generator = random.Random(6)
    size, _ = SIZES[format]

    def read(*scales):
        rows = (b"".join(random_block(format, generator, scale) for scale in row) for row in scales)
        return decode(format, tensor_of(*rows), size * len(scales[0]))

    assert read((0.5, 0.5), (0.5, 0.5)).scales.tolist() == [[0.5]]
    by_row = read((0.5, 0.5), (0.25, 0.25))
    assert (by_row.scales.tolist(), by_row.group_size) == ([[0.5], [0.25]], 2 * size)
    by_block = read((0.5, 0.5), (0.25, 0.125))
    assert (by_block.scales.tolist(), by_block.group_size) == ([[0.5, 0.5], [0.25, 0.125]], size)


# ---- what is refused ----


@pytest.mark.parametrize("format", BLOCKS)
def test_wrong_lengths_and_types_are_refused(format):
    block = BLOCKS[format]
    expected = block.row_bytes(2 * block.size)
    for length in (0, 1, expected - 1, expected + 1, 2 * expected):
        with pytest.raises(ValueError, match=rf"data: expected \[rows, {expected}\] bytes .*, got \[3, {length}\]"):
            decode(format, torch.zeros(3, length, dtype=torch.uint8), 2 * block.size)
    with pytest.raises(ValueError, match=r"data: expected \[rows"):
        decode(format, torch.zeros(0, expected, dtype=torch.uint8), 2 * block.size)
    for cols in (0, 1, block.size - 1, block.size + 1):
        with pytest.raises(ValueError, match=f"cols: expected a multiple of {block.size} for {format}, got {cols}"):
            decode(format, torch.zeros(3, expected, dtype=torch.uint8), cols)
    with pytest.raises(TypeError, match=r"data: expected dtype torch.uint8, got torch.int8"):
        decode(format, torch.zeros(3, expected, dtype=torch.int8), 2 * block.size)
    with pytest.raises(ValueError, match="data: expected 2 dimensions"):
        decode(format, torch.zeros(expected, dtype=torch.uint8), 2 * block.size)


@pytest.mark.parametrize("format", PLAIN)
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -0.5])
def test_scales_that_are_no_positive_numbers_are_refused(format, scale):
    generator = random.Random(7)
    rows = [random_block(format, generator) + random_block(format, generator, s) for s in (0.5, scale)]
    with pytest.raises(ValueError, match=rf"block scales: expected positive finite numbers, got {scale} at \[1, 1\]"):
        decode(format, tensor_of(*rows), 2 * SIZES[format][0])


@pytest.mark.parametrize("format", PLAIN)
def test_a_scale_of_zero_over_weights_is_refused(format):
    row = random_block(format, random.Random(8), 0)
    with pytest.raises(ValueError, match=r"block scales: expected a positive scale .*, got 0.0 at \[0, 0\]"):
        decode(format, tensor_of(row), SIZES[format][0])


def test_a_fourth_code_is_refused():
    block = bytearray(random_block("TQ2_0", random.Random(9)))
    block[17] |= 3 << 4
    with pytest.raises(ValueError, match="codes: expected 0, 1 or 2, got 3"):
        decode("TQ2_0", tensor_of(block), 256)
    with pytest.raises(ValueError, match="codes: expected 0, 1 or 2, got 3"):
        unpack_rows(torch.tensor([[0x55, 0xD5]], dtype=torch.uint8))


@pytest.mark.parametrize("format", ["PTQ1_0", "IQ1_BN", "I2_S", "TQ3_0"])
def test_formats_that_are_only_read_are_not_written(format):
    with pytest.raises(ValueError, match=f"format: expected one of TQ1_0, TQ2_0, got '{format}'"):
        encode(format, matrix(1, 256))


def test_what_the_formats_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="cols: expected a multiple of 256 for TQ1_0, got 320"):
        encode("TQ1_0", matrix(2, 320))
    for scale in (1e-9, 1e6):
        with pytest.raises(ValueError, match=r"scales: expected a number that fp16 holds, got .* at \[0, 0\]"):
            encode("TQ2_0", matrix(2, 256, scale))
    fine = TernaryMatrix(random_trits(2, 512), torch.ones(2, 4), 128)
    with pytest.raises(ValueError, match="group_size: expected a multiple of 256 or 512"):
        encode("TQ1_0", fine)


TERNARY = {
    "two": (torch.tensor([[0, 2]], dtype=torch.int8), r"trits: expected -1, 0 or 1, got 2 at \[0, 1\]"),
    "minus 128": (torch.tensor([[0], [-128]], dtype=torch.int8), r"trits: expected -1, 0 or 1, got -128 at \[1, 0\]"),
    "no rows": (torch.zeros(0, 4, dtype=torch.int8), r"trits: expected shape \[rows, cols\]"),
    "one dimension": (torch.zeros(4, dtype=torch.int8), r"trits: expected shape \[rows, cols\]"),
}


@pytest.mark.parametrize(("trits", "message"), TERNARY.values(), ids=TERNARY)
def test_trits_that_are_none_are_refused(trits, message):
    with pytest.raises(ValueError, match=message):
        TernaryMatrix(trits, torch.ones(1, 1))


def test_matrices_are_checked_when_they_are_made():
    trits = random_trits(4, 32)
    for scale in (0.0, float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match=rf"scales: expected positive finite numbers, got {scale} at \[0, 0\]"):
            TernaryMatrix(trits, torch.tensor([[scale]]))
    with pytest.raises(TypeError, match=r"trits: expected dtype torch.int8, got torch.float32"):
        TernaryMatrix(trits.float(), torch.ones(1, 1))
    with pytest.raises(TypeError, match=r"scales: expected dtype torch.float32, got torch.float16"):
        TernaryMatrix(trits, torch.ones(1, 1).half())
    with pytest.raises(ValueError, match=r"scales: expected shape \[4, 2\], got \[1, 1\]"):
        TernaryMatrix(trits, torch.ones(1, 1), 16)
    with pytest.raises(ValueError, match="group_size: expected -1 or 1 to 32, got 33"):
        TernaryMatrix(trits, torch.ones(4, 1), 33)


def test_packed_matrices_that_are_ternary_are_taken():
    ours = matrix(5, 96, 0.37)
    codes, zeros = (ours.trits + 1).view(torch.uint8), torch.ones(1, 1, dtype=torch.uint8)
    wide = lowbit.PackedMatrix.from_codes(codes, ours.scales, zeros, format="int2")
    assert TernaryMatrix.from_packed(wide).equal(ours)
    codes[3, 7] = 3
    wide = lowbit.PackedMatrix.from_codes(codes, ours.scales, zeros, format="int2")
    with pytest.raises(ValueError, match=r"codes: expected 0, 1 and 2 .*, got 3"):
        TernaryMatrix.from_packed(wide)
    for other, message in (("int2", "zeros: expected 1 everywhere"), ("int4", 'format: expected "trit" or "int2"')):
        with pytest.raises(ValueError, match=message):
            TernaryMatrix.from_packed(lowbit.PackedMatrix.from_float(ours.unpack(), other))
    permuted = lowbit.PackedMatrix.from_codes(
        ours.to_packed().unpack_codes(), ours.scales, None, torch.arange(96).flip(0).int(), format="trit"
    )
    with pytest.raises(ValueError, match="perm: expected a ternary matrix in its original column order"):
        TernaryMatrix.from_packed(permuted)
    for ternary in (ours, TernaryMatrix(random_trits(4, 512), torch.rand(4, 2).add(0.5), 256)):
        packed = ternary.to_packed()
        assert (packed.format, packed.shape, packed.group_size) == ("trit", ternary.shape, ternary.group_size)
        assert torch.equal(packed.unpack(), ternary.unpack())
        assert TernaryMatrix.from_packed(packed).equal(ternary)


# ---- never twice ----


def test_a_float_matrix_is_taken_only_when_it_is_ternary():
    ours = matrix(5, 48, 0.37)
    assert TernaryMatrix.from_float(ours.unpack()).equal(ours)
    bfloat = ours.unpack(torch.bfloat16)
    assert TernaryMatrix.from_float(bfloat).unpack().equal(bfloat.float())
    with pytest.raises(ValueError, match="weight: expected nonzero elements of one magnitude"):
        TernaryMatrix.from_float(torch.tensor([[0.5, 0.25]]))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"weight: expected finite numbers, got {value} at \[0, 1\]"):
            TernaryMatrix.from_float(torch.tensor([[0.5, value]]))
    with pytest.raises(TypeError, match=r"weight: expected a float dtype, got torch.int32"):
        TernaryMatrix.from_float(torch.ones(1, 1, dtype=torch.int32))


# ---- rows in quarters, and I2_S ----


@pytest.mark.parametrize("rows", [4, 8, 20, 64])
def test_bitnet_packing_is_planar_over_rows(rows):
    trits = random_trits(rows, 7, seed=rows)
    packed = pack_rows(trits)
    assert (packed.dtype, list(packed.shape)) == (torch.uint8, [rows // 4, 7])
    for i in range(rows // 4):
        for c in range(7):
            assert packed[i, c] == sum(int(trits[i + j * rows // 4, c] + 1) << (2 * j) for j in range(4))
    assert torch.equal(unpack_rows(packed), trits)
    from transformers.integrations import bitnet

    assert torch.equal(bitnet.pack_weights(trits.clone()), packed)


def test_bitnet_packing_takes_rows_in_fours():
    for rows in (1, 2, 3, 5, 6):
        with pytest.raises(ValueError, match=f"rows: expected a multiple of 4 .*, got {rows}"):
            pack_rows(random_trits(rows, 4))
    with pytest.raises(TypeError, match=r"data: expected dtype torch.uint8, got torch.int8"):
        unpack_rows(torch.zeros(1, 4, dtype=torch.int8))


def i2_s(trits, scale):
    """An I2_S tensor as a build for x86 writes it."""
    flat = (trits.flatten() + 1).tolist()
    data = bytearray()
    for begin in range(0, len(flat), 128):
        w = flat[begin : begin + 128]
        data += bytes(w[j] << 6 | w[32 + j] << 4 | w[64 + j] << 2 | w[96 + j] for j in range(32))
    return bytes(data) + struct.pack("<f", scale) + bytes(28)


def test_i2_s_is_read_only_when_its_layout_is_known():
    trits = random_trits(6, 64, seed=11)
    data = torch.frombuffer(bytearray(i2_s(trits, 1.2109375)), dtype=torch.uint8)
    read = decode_i2_s(data, 6, 64, "x86")
    assert torch.equal(read.trits, trits)
    assert read.scales.tolist() == [[1.2109375]]
    with pytest.raises(ValueError, match=r"I2_S: layout: expected to be told .* one of x86, got None"):
        decode_i2_s(data, 6, 64, None)
    with pytest.raises(ValueError, match="I2_S: layout: expected one of x86, got 'arm'"):
        decode_i2_s(data, 6, 64, "arm")


def test_damaged_i2_s_is_refused():
    data = torch.frombuffer(bytearray(i2_s(random_trits(2, 128), 1.0)), dtype=torch.uint8)
    for wrong in (data[:-1], data[:64], torch.cat([data, data[:1]])):
        with pytest.raises(ValueError, match=f"data: expected 96 bytes for 2x128, got {wrong.numel()}"):
            decode_i2_s(wrong, 2, 128, "x86")
    with pytest.raises(ValueError, match="shape: expected a multiple of 128 weights for I2_S, got 2x96"):
        decode_i2_s(data, 2, 96, "x86")
    for scale in (0.0, float("inf"), float("nan"), -1.0):
        wrong = torch.frombuffer(bytearray(i2_s(random_trits(2, 128), scale)), dtype=torch.uint8)
        with pytest.raises(ValueError, match=f"scales: expected positive finite numbers, got {scale}"):
            decode_i2_s(wrong, 2, 128, "x86")
    data[5] |= 0xC0
    with pytest.raises(ValueError, match="codes: expected 0, 1 or 2, got 3"):
        decode_i2_s(data, 2, 128, "x86")


# ---- GGUF files ----


def small_file(path, ternary="TQ1_0"):
    tensors = {
        "blk.0.attn_q.weight": matrix(6, 512),
        "blk.0.attn_norm.weight": torch.arange(7.0),
        "blk.1.attn_q.weight": TernaryMatrix(random_trits(3, 256, 1), torch.tensor([[0.5], [0.25], [0.125]])),
        "token_embd.weight": torch.arange(20.0).bfloat16().view(4, 5),
        "output.weight": torch.arange(6.0).half().view(2, 3),
    }
    metadata = {
        **LLAMA,
        "general.name": "small ×",
        "llama.block_count": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["a", "", "Ġb"],
        "tokenizer.ggml.scores": np.array([0.5, -1.0], np.float32),
        "tokenizer.ggml.token_type": [1, -2],
        "tokenizer.ggml.add_bos_token": True,
        "some.flags": [True, False],
        "split.count": np.uint16(3),
        "some.large": 1 << 40,
    }
    write_gguf(path, tensors, metadata, ternary=ternary)
    return tensors, metadata


@pytest.mark.parametrize("ternary", ["TQ1_0", "TQ2_0"])
def test_files_are_what_the_gguf_package_reads_and_read_back(ternary, tmp_path):
    path = tmp_path / "small.gguf"
    tensors, metadata = small_file(path, ternary)
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.gguf"]
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ours = GgufFile(path)
    assert list(ours.tensors) == list(theirs) == list(tensors)
    for name, tensor in tensors.items():
        info = ours.tensors[name]
        assert info.shape == tuple(tensor.shape) == tuple(theirs[name].shape[::-1].tolist())
        assert info.type == theirs[name].tensor_type.name
        assert info.begin == theirs[name].data_offset
        if isinstance(tensor, TernaryMatrix):
            dense = quants.dequantize(np.array(theirs[name].data), theirs[name].tensor_type)
            assert np.array_equal(dense, tensor.unpack().numpy())
            assert ours.ternary(name).equal(tensor)
            assert torch.equal(ours.packed(name).unpack(), tensor.unpack())
        else:
            assert torch.equal(ours.floats(name), tensor)
    assert ours.metadata["general.quantization_version"] == 2
    for key, value in metadata.items():
        found = ours.metadata[key]
        assert found.tolist() == list(value) if isinstance(found, np.ndarray) else found == value
    widths = {"llama.block_count": np.uint32, "split.count": np.uint16, "some.large": np.int64}
    for key, width in widths.items():
        assert isinstance(ours.metadata[key], width)
    again = tmp_path / "again.gguf"
    packed = {name: t.to_packed() if isinstance(t, TernaryMatrix) else t for name, t in tensors.items()}
    write_gguf(again, packed, ours.metadata, ternary=ternary)
    assert again.read_bytes() == path.read_bytes()


def test_another_alignment(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"a": torch.ones(3), "b": matrix(1, 256)}, {**LLAMA, "general.alignment": 128})
    ours = GgufFile(path)
    assert [tensor.begin % 128 for tensor in ours.tensors.values()] == [0, 0]
    assert ours.ternary("b").equal(matrix(1, 256))


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({}, {}, ValueError, "metadata: general.architecture: expected a text"),
        ({"a": matrix(1, 64)}, LLAMA, ValueError, "a: cols: expected a multiple of 256 for TQ1_0, got 64"),
        ({"a": matrix(1, 256, 1e9)}, LLAMA, ValueError, "a: scales: expected a number that fp16 holds"),
        ({"a": torch.ones(3).int()}, LLAMA, TypeError, "a: expected a ternary matrix, float32, .* got torch.int32"),
        ({"a": torch.ones(0, 3)}, LLAMA, ValueError, r"a: shape: expected 1 to 4 positive sizes, got \[0, 3\]"),
        ({"a" * 64: torch.ones(3)}, LLAMA, ValueError, "name: expected 1 to 63 bytes, got 64"),
        ({}, {**LLAMA, "x": []}, ValueError, "metadata: x: expected a list of one or more values"),
        ({}, {**LLAMA, "x": {}}, TypeError, "metadata: x: expected text, a bool, a number or a list"),
        ({}, {**LLAMA, "x": [1, "a"]}, TypeError, "metadata: x: expected elements of one type, got STRING, UINT32"),
        ({}, {**LLAMA, "x": 1 << 64}, ValueError, "metadata: x: expected an integer of 64 bits"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_leaves_nothing(tensors, metadata, error, message, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"as it was")
    with pytest.raises(error, match=message):
        write_gguf(path, tensors, metadata)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("a.gguf", b"as it was")]


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def info(name, shape, kind, offset):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def file_of(infos=(), pairs=(), data=b"", tensors=None, metadata=None, version=3, magic=b"GGUF", alignment=32):
    tensors = len(infos) if tensors is None else tensors
    metadata = len(pairs) if metadata is None else metadata
    head = magic + struct.pack("<IQQ", version, tensors, metadata) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


HUGE = (1 << 64) - 1
F32 = [info("a", (2, 4), 0, 0)]
DATA = bytes(32)
ARRAY = struct.pack("<IQ", 4, HUGE)

BROKEN = {
    "empty": (b"", "expected a GGUF file, got 0 bytes"),
    "short": (b"GGU", "magic: expected 4 bytes at 0, got a file of 3 bytes"),
    "another magic": (file_of(magic=b"GGML"), "magic: expected b'GGUF', got b'GGML'"),
    "version 1": (file_of(version=1), "version: expected 2 or 3, little endian, got 1"),
    "big endian": (file_of(version=3 << 24), "version: expected 2 or 3, little endian, got 50331648"),
    "tensors without room": (file_of(tensors=HUGE), f"number of tensors: expected at most 0, got {HUGE}"),
    "pairs without room": (file_of(metadata=HUGE), f"number of metadata pairs: expected at most 0, got {HUGE}"),
    "one pair too many": (file_of(F32, data=DATA, metadata=1), r"tensor name: expected \d+ bytes at 47, got a file"),
    "wild key length": (
        file_of(pairs=[struct.pack("<Q", HUGE) + bytes(8)]),
        f"metadata key: expected {HUGE} bytes at 32, got a file of 64 bytes",
    ),
    "wild text length": (file_of(pairs=[pair("k", 8, struct.pack("<Q", 1 << 62))]), f"k: expected {1 << 62} bytes"),
    "wild array": (file_of(pairs=[pair("k", 9, ARRAY)]), f"k: expected {4 * HUGE} bytes"),
    "wild array of texts": (
        file_of(pairs=[pair("k", 9, struct.pack("<IQ", 8, 1 << 40))]),
        f"k: length: expected room for {1 << 40} texts",
    ),
    "array of arrays": (file_of(pairs=[pair("k", 9, struct.pack("<IQ", 9, 1) + bytes(12))]), "k: type: .* got type 9"),
    "unknown value type": (file_of(pairs=[pair("k", 13, bytes(8))]), "k: type: expected a number, .* got type 13"),
    "key of no text": (file_of(pairs=[pair(b"\xff\xfe", 4, bytes(4))]), "metadata key: expected UTF-8"),
    "the same key": (file_of(pairs=[pair("k", 4, bytes(4))] * 2), "k: expected each metadata key once"),
    "boolean 2": (file_of(pairs=[pair("k", 7, b"\x02")]), r"k: expected booleans \(0 or 1\), got 2"),
    "alignment 0": (file_of(pairs=[pair("general.alignment", 4, bytes(4))]), "general.alignment: expected a uint32"),
    "alignment 33": (
        file_of(pairs=[pair("general.alignment", 4, struct.pack("<I", 33))]),
        r"general.alignment: expected a uint32 power of two, got np.uint32\(33\)",
    ),
    "alignment in text": (file_of(pairs=[pair("general.alignment", 8, text("32"))]), "expected a uint32 .* got '32'"),
    "alignment beyond the file": (
        file_of(F32, [pair("general.alignment", 4, struct.pack("<I", 1 << 31))], DATA),
        f"a: expected 32 bytes of F32 .* at {1 << 31}, got a file of",
    ),
    "no dimensions": (file_of([info("a", (), 0, 0)], data=DATA), "a: dimensions: expected 1 to 4, got 0"),
    "wild dimensions": (
        file_of([text("a") + struct.pack("<I", 0xFFFFFFFF) + bytes(32)]),
        "a: dimensions: expected 1 to 4, got 4294967295",
    ),
    "size 0": (file_of([info("a", (0, 4), 0, 0)], data=DATA), r"a: shape: expected positive sizes, got \[0, 4\]"),
    "wild sizes": (
        file_of([info("a", (1 << 63, 1 << 63), 0, 0)], data=DATA),
        rf"a: expected {4 << 126} bytes of F32 \[{1 << 63}, {1 << 63}\] at 96, got a file of 128 bytes",
    ),
    "the same tensor": (file_of(F32 * 2, data=DATA), "a: expected each tensor once, got it twice"),
    "name of no text": (file_of([info(b"\xff", (2,), 0, 0)], data=DATA), "tensor name: expected UTF-8"),
    "odd offset": (file_of([info("a", (2, 4), 0, 8)], data=DATA * 2), "a: offset: expected a multiple of 32, got 8"),
    "wild offset": (
        file_of([info("a", (2, 4), 0, 1 << 63)], data=DATA),
        f"a: expected 32 bytes .* at {(1 << 63) + 96}",
    ),
    "wild offset of an unknown type": (
        file_of([info("a", (2,), 99, 1 << 40)]),
        "a: expected a place at .*, got a file",
    ),
    "cut off": (file_of(F32, data=DATA[:-1]), r"a: expected 32 bytes of F32 \[2, 4\] at 96, got a file of 127 bytes"),
    "overlap": (
        file_of([info("a", (2, 8), 0, 0), info("b", (2, 4), 0, 32)], data=DATA * 4),
        "b: offset: expected at least 192 bytes into the file, .* got 160",
    ),
    "the same place": (file_of([*F32, info("b", (2, 4), 0, 0)], data=DATA), "b: offset: expected at least"),
    "columns of no block": (
        file_of([info("a", (1, 255), 34, 0)], data=DATA * 2),
        r"a: shape: expected a multiple of 256 columns for TQ1_0, got \[1, 255\]",
    ),
    "columns of no IQ1_BN block": (
        file_of([info("a", (1, 63), 134, 0)], data=DATA),
        "a: cols: expected a multiple of 64 for IQ1_BN, got 63",
    ),
    "weights of no I2_S byte": (
        file_of([info("a", (3, 5), 36, 0)], data=DATA * 2),
        "a: shape: expected a multiple of 4",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(content, message, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        GgufFile(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.gguf"
    with open(path, "wb") as file:
        file.write(file_of(pairs=[pair("k", 9, struct.pack("<IQ", 0, HEADER_LIMIT))]))
        file.truncate(2 * HEADER_LIMIT)
    with pytest.raises(ValueError, match=f"header: expected at most {HEADER_LIMIT} bytes, k lies beyond"):
        GgufFile(path)


def test_a_missing_file_and_a_missing_tensor(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.gguf: not found"):
        GgufFile(tmp_path / "a.gguf")
    small_file(tmp_path / "a.gguf")
    with pytest.raises(KeyError, match=r"a.gguf: nothing: no such tensor"):
        GgufFile(tmp_path / "a.gguf").ternary("nothing")


def everything(path):
    """All that a file says."""
    file = GgufFile(path)
    read = {}
    for name, tensor in file.tensors.items():
        read[name] = (
            file.floats(name) if tensor.type in ("F32", "F16", "BF16") else file.ternary(name).unpack()
        ).clone()
    return file, read


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    small_file(path)
    content = path.read_bytes()
    _, whole = everything(path)
    end = max(tensor.end for tensor in GgufFile(path).tensors.values())
    for length in {*range(0, 1000, 7), *range(1000, len(content), 29), *range(end - 4, len(content))}:
        path.write_bytes(content[:length])
        if length < end:
            with pytest.raises(ValueError, match=r"a\.gguf: "):
                GgufFile(path)
        else:  # only padding is missing
            assert all(torch.equal(tensor, whole[name]) for name, tensor in everything(path)[1].items())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    path = folder / "a.gguf"
    if not folder.exists():
        folder.mkdir()
        small_file(folder / "whole.gguf")
    content = bytearray((folder / "whole.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        everything(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


def test_types_that_are_not_read_are_listed_and_refused_by_name(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(
        file_of([info("q", (1, 32), 2, 0), info("new", (3,), 99, 32), info("f", (1, 8), 0, 64)], data=DATA * 3)
    )
    file = GgufFile(path)
    assert {name: tensor.type for name, tensor in file.tensors.items()} == {"q": "Q4_0", "new": "type 99", "f": "F32"}
    for name, kind in (("q", "Q4_0"), ("new", "type 99"), ("f", "F32")):
        with pytest.raises(ValueError, match=f"{name}: type: expected one of TQ1_0, .*, I2_S, got {kind}"):
            file.ternary(name)
    for name, kind in (("q", "Q4_0"), ("new", "type 99")):
        with pytest.raises(ValueError, match=f"{name}: type: expected one of F32, F16, BF16, got {kind}"):
            file.floats(name)


def test_ternary_types_that_only_others_write_are_read(tmp_path):
    path = tmp_path / "a.gguf"
    generator = random.Random(12)
    trits = random_trits(2, 128, seed=13)
    bn = half(0.5) + bytes([byte_of([1] * 5)] * 12 + [byte_of([0, 2, 1, 0, 1])])
    ptq = random_block("PTQ1_0", generator, 0.25)
    parts = {"i2": (36, (2, 128), i2_s(trits, 0.75)), "bn": (134, (1, 64), bn), "ptq": (143, (1, 128), ptq)}
    infos, data = [], b""
    for name, (kind, shape, content) in parts.items():
        infos.append(info(name, shape, kind, len(data)))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(file_of(infos, data=data))
    file = GgufFile(path)
    assert file.ternary("bn").trits[0].tolist() == plain_iq1_bn(bn, 64)[0]
    assert file.ternary("ptq").trits[0].tolist() == plain_ptq1_0(ptq)[0]
    assert torch.equal(file.ternary("i2", i2_s_layout="x86").unpack(), 0.75 * trits)
    with pytest.raises(ValueError, match=r"a.gguf: i2: I2_S: layout: expected to be told"):
        file.ternary("i2")


def test_three_dimensions_are_no_matrix(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(file_of([info("a", (2, 1, 256), 35, 0)], data=bytes(132)))
    with pytest.raises(ValueError, match=r"a: shape: expected \[rows, cols\], got \[2, 1, 256\]"):
        GgufFile(path).ternary("a")
