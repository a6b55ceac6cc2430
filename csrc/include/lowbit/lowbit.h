/* lowbit: low-bit weight matrices. One noun, the packed matrix; four verbs: pack, unpack, matmul, gather.
 *
 * A plain C API over pointers the caller owns. Nothing here prints, exits or throws. Every function returns a
 * lowbit_status; after a failure lowbit_last_error() (per thread) names the thing, what was expected and what was
 * found. Layouts: formats.h and docs/formats.md; arithmetic: docs/numerics.md. N = rows = out_features (or the
 * vocabulary), K = cols = in_features.
 */
#ifndef LOWBIT_LOWBIT_H
#define LOWBIT_LOWBIT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define LOWBIT_ABI_VERSION 1
#if defined(LOWBIT_BUILDING)
#define LOWBIT_API __attribute__((visibility("default")))
#else
#define LOWBIT_API
#endif

/* In C++ an enum of fixed width may hold any int, so a wrong value is refused by a check and not undefined. */
#if defined(__cplusplus)
#define LOWBIT_ENUM_TYPE : int
#else
#define LOWBIT_ENUM_TYPE
#endif

typedef enum lowbit_status LOWBIT_ENUM_TYPE {
  LOWBIT_OK = 0,
  LOWBIT_INVALID_ARGUMENT = 1, /* a value, shape or combination that no call could accept */
  LOWBIT_OUT_OF_RANGE = 2,     /* an id or index outside its table */
  LOWBIT_UNSUPPORTED = 3,      /* valid, but this build or machine cannot do it */
  LOWBIT_OUT_OF_MEMORY = 4,
  LOWBIT_NUMERIC = 5 /* data that the method cannot go on with (solver) */
} lowbit_status;

/* The value of an integer format is its width in bits. LOWBIT_TRIT: five ternary digits a byte, 1.6 bits a weight;
 * codes 0, 1, 2 mean -1, 0, 1 and there are no zeros. */
typedef enum lowbit_format LOWBIT_ENUM_TYPE {
  LOWBIT_TRIT = 1,
  LOWBIT_INT2 = 2,
  LOWBIT_INT3 = 3,
  LOWBIT_INT4 = 4,
  LOWBIT_INT8 = 8
} lowbit_format;

typedef enum lowbit_dtype LOWBIT_ENUM_TYPE {
  LOWBIT_F32 = 0,
  LOWBIT_F16 = 1,
  LOWBIT_BF16 = 2,
  LOWBIT_I32 = 3,
  LOWBIT_I64 = 4
} lowbit_dtype;

/* How matmul represents its activations: two int8 digits (16-bit fixed point, the default) or one, per chunk. With a
 * ternary matrix LOWBIT_ACT_INT8 is BitNet's: one step a token, max(max|x|, 1e-5) / 127. */
typedef enum lowbit_activations LOWBIT_ENUM_TYPE { LOWBIT_ACT_FLOAT = 0, LOWBIT_ACT_INT8 = 1 } lowbit_activations;

/* What gather does with an id outside [0, rows). */
typedef enum lowbit_id_policy LOWBIT_ENUM_TYPE {
  LOWBIT_IDS_ERROR = 0,
  LOWBIT_IDS_ZERO = 1,
  LOWBIT_IDS_CLAMP = 2
} lowbit_id_policy;

/* A view of a packed matrix: W[n,k] = scales[n, g] * (code[n,k] - zeros[n, g]), g = k / group_size, k < cols.
 * With perm, column j of the packed matrix is column perm[j] of the original. */
typedef struct lowbit_matrix {
  lowbit_format format;
  int64_t rows, cols;
  int64_t group_size;   /* a multiple of 16, or cols (one group a row); -1 means cols */
  const uint8_t* codes; /* [rows][lowbit_row_lines][64] */
  const void* scales;   /* [scale_rows][scale_cols]: [rows][G], or [rows][1], or [1][1] */
  lowbit_dtype scale_dtype;
  int64_t scale_rows, scale_cols;
  const uint8_t* zeros; /* the shape of scales; NULL: 2^(bits-1) everywhere */
  const int32_t* perm;  /* [cols], a permutation, or NULL */
} lowbit_matrix;

LOWBIT_API int32_t lowbit_abi_version(void);
LOWBIT_API const char* lowbit_version(void); /* "0.1.0" */
LOWBIT_API const char* lowbit_last_error(void);
LOWBIT_API const char* lowbit_status_name(lowbit_status status);

/* ---- the noun ---- */

/* Lines of 64 bytes that a row takes; 0 when format or cols is invalid. */
LOWBIT_API int64_t lowbit_row_lines(lowbit_format format, int64_t cols);

/* Checks everything that a kernel relies on. Shapes, sizes, pointers and dtypes always; with `values` also every
 * scale (finite; trit: not 0), every zero (<= 2^bits - 1), perm (a permutation) and every ternary byte (13 of the 256
 * encode nothing). Do it once, when a matrix is made. */
LOWBIT_API lowbit_status lowbit_matrix_check(const lowbit_matrix* w, int values);

/* Memory for codes: 64-byte aligned, zeroed, on 2 MiB pages where the system gives them (4 KiB pages cost up to a third
 * of the bandwidth on virtual machines). NULL when there is none. Free with the same size. */
LOWBIT_API void* lowbit_alloc(size_t bytes);
LOWBIT_API void lowbit_free(void* memory, size_t bytes);

/* ---- pack ---- */

/* codes_out[rows][row_lines][64] from unpacked codes [rows][cols] (one a byte). Padding gets the zero point of its
 * group (so it decodes to zero). A code above 2^bits - 1 (trit: above 2) is LOWBIT_OUT_OF_RANGE, named by row and
 * column. Only format, rows, cols, group_size, scale_rows, scale_cols and zeros of `w` are read. */
LOWBIT_API lowbit_status lowbit_pack_codes(const lowbit_matrix* w, const uint8_t* codes, uint8_t* codes_out);

/* Round to nearest: the grid of each group from its minimum and maximum, scales rounded to scale_dtype first, then
 * codes. src [rows][cols] with row stride in elements. zeros_out NULL: symmetric (zero 2^(bits-1), scale
 * 2*max|w|/(2^bits-1)); else asymmetric. clip: 0 none, 1 searches the clipping that minimises sum |error|^2.4.
 * Ternary: scale mean|w| (clip 0) or the one that minimises that sum (clip 1), no zeros; a group that is ternary
 * already, its nonzero |w| all one number, keeps that number exactly.
 * Non-finite weights are LOWBIT_INVALID_ARGUMENT. */
LOWBIT_API lowbit_status lowbit_pack_float(lowbit_format format, int64_t rows, int64_t cols, int64_t group_size,
                                           const void* src, lowbit_dtype src_dtype, int64_t src_stride,
                                           lowbit_dtype scale_dtype, int clip, uint8_t* codes_out, void* scales_out,
                                           uint8_t* zeros_out);

/* GPTQ word streams, qweight int32 [cols*bits/32][rows], qzeros int32 [G][rows*bits/32]; version 1 stores zero - 1,
 * 2 stores zero. Reads give codes [rows][cols] and zeros [rows][G], one a byte. An ambiguous v1 word (docs/formats.md
 * section 2) is LOWBIT_INVALID_ARGUMENT. Writes are the inverse; v1 with a zero of 0 is LOWBIT_INVALID_ARGUMENT. */
LOWBIT_API lowbit_status lowbit_gptq_read_weight(int bits, int64_t rows, int64_t cols, const int32_t* qweight,
                                                 uint8_t* codes);
LOWBIT_API lowbit_status lowbit_gptq_read_zeros(int bits, int version, int64_t rows, int64_t groups,
                                                const int32_t* qzeros, uint8_t* zeros);
LOWBIT_API lowbit_status lowbit_gptq_write_weight(int bits, int64_t rows, int64_t cols, const uint8_t* codes,
                                                  int32_t* qweight);
LOWBIT_API lowbit_status lowbit_gptq_write_zeros(int bits, int version, int64_t rows, int64_t groups,
                                                 const uint8_t* zeros, int32_t* qzeros);

/* ---- unpack ---- */

/* Codes of rows [row_begin, row_end), one a byte, [row_end - row_begin][cols], in packed column order. */
LOWBIT_API lowbit_status lowbit_unpack_codes(const lowbit_matrix* w, int64_t row_begin, int64_t row_end, uint8_t* out);

/* Floats of rows [row_begin, row_end) in original column order; out_stride in elements. */
LOWBIT_API lowbit_status lowbit_unpack(const lowbit_matrix* w, int64_t row_begin, int64_t row_end, void* out,
                                       lowbit_dtype out_dtype, int64_t out_stride);

/* ---- matmul ---- */

/* Bytes of scratch that lowbit_matmul needs for `tokens` tokens, 64-byte aligned. */
LOWBIT_API size_t lowbit_matmul_workspace(const lowbit_matrix* w, int64_t tokens, lowbit_activations activations);

/* How lowbit_matmul takes tokens for a format at the allowed level: at most *batch at a time, whose activations lie as
 * tiles of 16 tokens, and as rows where fewer than *tiles_from are left: of fewer tokens than that, or of the last tile. */
LOWBIT_API lowbit_status lowbit_matmul_batching(lowbit_format format, lowbit_activations activations, int64_t* batch,
                                                int64_t* tiles_from);

/* And how it takes rows of the matrix where activations lie as rows: one by one up to *columns columns (INT64_MAX: always);
 * beyond, two or three rows read the tokens' digits together (not groups of 16 columns, nor trits in groups; trits at the
 * levels avx512vnni and amx alone, and nothing at ref). */
LOWBIT_API lowbit_status lowbit_matmul_sharing(lowbit_format format, int64_t tokens, lowbit_activations activations,
                                               int64_t* columns);

/* Chooses both for a format, for CPUs whose best was not measured (lowbit's bench/blocking.py finds it): tiles from so many
 * tokens on (at least 1), and rows one by one while all tokens' digits take at most so many bytes (0: always together).
 * -1: lowbit's own choice. The same bits come out. Calls under way keep what they began with, and a workspace is of the
 * size that was asked for under the same choice. At start the environment's LOWBIT_TILES_FROM and LOWBIT_OWN_DIGIT_BYTES
 * are read, a number for all formats or "int4=9,trit=12"; if one is invalid, every product fails with its message. */
LOWBIT_API lowbit_status lowbit_set_matmul_blocking(lowbit_format format, int64_t tiles_from, int64_t own_digit_bytes);

/* y[m][n] = sum_k x[m][k] * W[n][k] + bias[n]; x [tokens][cols], y [tokens][rows] of the same dtype (f32, f16,
 * bf16), strides in elements; bias [rows] of any float dtype or NULL. Any tokens >= 0. workspace NULL: allocated
 * inside the call. Bit-identical for every ISA, thread count and batch size. */
LOWBIT_API lowbit_status lowbit_matmul(const lowbit_matrix* w, const void* x, lowbit_dtype dtype, int64_t tokens,
                                       int64_t x_stride, const void* bias, lowbit_dtype bias_dtype, void* y,
                                       int64_t y_stride, lowbit_activations activations, void* workspace,
                                       size_t workspace_bytes);

/* Several products of one input: the queries, keys and values of a layer, or its gate and up. */
#define LOWBIT_MAX_GROUP 16
typedef struct lowbit_product {
  const lowbit_matrix* w; /* of any format; all of a group have the same cols */
  const void* bias;       /* [rows] of bias_dtype, or NULL */
  lowbit_dtype bias_dtype;
  void* y; /* [tokens][rows] of x's dtype */
  int64_t y_stride;
} lowbit_product;

/* As lowbit_matmul for each of 1 to LOWBIT_MAX_GROUP products, bit for bit, in one call: activations are prepared once
 * for all matrices that read them alike, and threads start once. Nothing is written unless every product is sound. */
LOWBIT_API lowbit_status lowbit_matmul_group(const lowbit_product* products, int count, const void* x,
                                             lowbit_dtype dtype, int64_t tokens, int64_t x_stride,
                                             lowbit_activations activations, void* workspace, size_t workspace_bytes);

/* Bytes of scratch that lowbit_matmul_group needs, 64-byte aligned; 0 for products that it would refuse. */
LOWBIT_API size_t lowbit_matmul_group_workspace(const lowbit_product* products, int count, int64_t tokens,
                                                lowbit_activations activations);

/* ---- gather ---- */

/* out[i][:] = W[ids[i]][:] in original column order; ids int32 or int64. */
LOWBIT_API lowbit_status lowbit_gather(const lowbit_matrix* w, const void* ids, lowbit_dtype id_dtype, int64_t count,
                                       lowbit_id_policy policy, void* out, lowbit_dtype out_dtype, int64_t out_stride);

/* Embedding bags: out[b] = sum (mean: over the rows counted) of W[ids[i]] for offsets[b] <= i < offsets[b + 1], added in
 * fp32 in the order of ids. padding_id (-1: none) is left out, of a mean's count too; an empty bag is zeros. offsets
 * int64 [bags + 1], nondecreasing; what lies outside [0, count] is cut off, and ids in no bag are not looked at.
 * weights fp32 [count] or NULL: row i is multiplied by weights[i] as it is added, both rounded once (a fused
 * multiply-add); not with mean. first_bad NULL, or where ERROR puts the smallest place of an id outside [0, rows).
 * Bit-identical for every ISA and thread count. Takes scratch from the heap within the call. */
LOWBIT_API lowbit_status lowbit_gather_bags(const lowbit_matrix* w, const void* ids, lowbit_dtype id_dtype,
                                            int64_t count, const int64_t* offsets, int64_t bags, const float* weights,
                                            int mean, lowbit_id_policy policy, int64_t padding_id, int64_t* first_bad,
                                            void* out, lowbit_dtype out_dtype, int64_t out_stride);

/* ---- a decoder layer, between its products ----
 *
 * What Llama and its relatives do to a token outside their matrices, for hosts whose own operators cost more than the
 * work: rounded step by step as Transformers' modules in the same dtype round, sums in fp32. dtype: f32, f16 or bf16, of
 * every operand of a call. Strides in elements. Bit-identical for every ISA and thread count. */

/* y[m] = weight * (s / sqrt(mean(s^2) + eps)), s = x[m] + residual[m]; x, residual, sum and y [tokens][size], weight
 * [size]. residual NULL: s = x[m] and sum is not written; else sum[m] = s. With a residual y may be NULL: the sum alone,
 * and weight is not read. sum may be x or residual, y may be x. */
LOWBIT_API lowbit_status lowbit_rms_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                                         const void* weight, float eps, lowbit_dtype dtype, int64_t tokens,
                                         int64_t size, void* sum, int64_t sum_stride, void* y, int64_t y_stride);

/* y = silu(gate) * up, [tokens][size]. y may be gate or up. */
LOWBIT_API lowbit_status lowbit_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                                         lowbit_dtype dtype, int64_t tokens, int64_t size, void* y, int64_t y_stride);

/* One new token each of `sequences` sequences that have `past` tokens behind them. */
typedef struct lowbit_decode_step {
  lowbit_dtype dtype;
  int64_t sequences, heads, kv_heads, head_size; /* heads: a multiple of kv_heads; head_size: of 16, up to 512 */
  int64_t past;
  float scale;                          /* of q . k */
  const void *q, *k, *v;                /* [sequences][heads or kv_heads][head_size] */
  int64_t q_stride, k_stride, v_stride; /* between sequences */
  const void *cos, *sin; /* [sequences][head_size] of the new place, halves alike; NULL: q and k are not rotated */
  int64_t angle_stride;  /* between sequences; 0: the same for all */
  void *keys, *values;   /* the cache, [sequences][kv_heads][places][head_size] with more than `past` places */
  int64_t cache_sequence_stride, cache_head_stride;
  void* y;          /* [sequences][heads][head_size] */
  int64_t y_stride; /* between sequences */
} lowbit_decode_step;

/* Rotates q and k (x * cos + [-x2, x1] * sin), puts k and v at place `past` of the cache, and attends to places 0 to past:
 * y[h] = sum_t softmax_t(scale * q[h] . keys[t]) * values[t], query head h reading kv head h / (heads / kv_heads). */
LOWBIT_API lowbit_status lowbit_decode_attention(const lowbit_decode_step* step);

/* A linear of a layer, and a norm (weight [size] of the layer's dtype). */
typedef struct lowbit_linear {
  const lowbit_matrix* w;
  const void* bias; /* [rows] of bias_dtype, or NULL */
  lowbit_dtype bias_dtype;
  lowbit_activations activations;
} lowbit_linear;

typedef struct lowbit_norm {
  const void* weight; /* NULL: there is no such norm */
  float eps;
} lowbit_norm;

/* A pre-norm layer with a gated MLP: Llama's, Mistral's, Qwen2's, and with norms of queries and keys Qwen3's. q, k and v
 * quantize their input alike, and so do gate and up: by the activations of the first. */
typedef struct lowbit_decoder_layer {
  lowbit_linear q, k, v, o, gate, up, down;
  lowbit_norm input, output, q_norm, k_norm; /* of the layer's input, its attention's output, each head of q and of k */
} lowbit_decoder_layer;

/* A whole layer for one new token of each sequence, x and y [sequences][hidden], which may be one:
 *   s = x + o(attention(q, k, v of norm(x))),  y = s + down(silu(gate(norm(s))) * up(norm(s))).
 * Of `step` q, k, v, y and their strides are not read, nor head counts: they follow from the matrices' rows. The bits of
 * the calls above, one after the other. Takes scratch from the heap within the call. */
LOWBIT_API lowbit_status lowbit_decode_layer(const lowbit_decoder_layer* layer, const lowbit_decode_step* step,
                                             const void* x, void* y);

/* `count` layers one after the other, layers[i] with steps[i] (its own keys and values; dtype and sequences alike), and
 * the norm `last` (NULL, or of no weight: none) of what comes out: a token of a whole model but for its table and head.
 * Shapes are checked before anything is written. */
LOWBIT_API lowbit_status lowbit_decode_layers(const lowbit_decoder_layer* const* layers,
                                              const lowbit_decode_step* steps, int count, const lowbit_norm* last,
                                              const void* x, void* y);

/* ---- the GPTQ column solver ---- */

typedef struct lowbit_gptq_options {
  lowbit_format format;
  int64_t group_size;       /* -1 means cols */
  int symmetric;            /* 1: zero 2^(bits-1) */
  int clip;                 /* 1: search the clipping of each group's grid */
  int static_grids;         /* 1: scales and zeros are given, not computed, and indexed by group_index */
  lowbit_dtype scale_dtype; /* scales are rounded to it before they are used */
  int64_t block_size;       /* columns solved between two trailing updates; 0 means 128 */
} lowbit_gptq_options;

/* Quantizes weight [rows][cols] fp32, columns already in solving order, column by column, pushing each column's error
 * onto the columns after it. factor [cols][cols] fp32: U upper triangular, H^-1 = U^T U (what lies below the diagonal
 * is not read); NULL: errors are not pushed on, which is rounding to nearest. A diagonal that is not positive is
 * LOWBIT_NUMERIC. Writes codes [rows][cols], one a byte, scales [rows][G] fp32 (values exact in scale_dtype), zeros
 * [rows][G] (may be NULL when symmetric) and loss [rows] (sum of squared weighted errors; may be NULL). group_index
 * int32 [cols]: the group of each column (static grids with act-order), or NULL: column / group_size. The same bits for
 * every ISA, thread count and block size. */
LOWBIT_API lowbit_status lowbit_gptq_solve(const lowbit_gptq_options* options, int64_t rows, int64_t cols,
                                           const float* weight, const float* factor, const int32_t* group_index,
                                           uint8_t* codes, float* scales, uint8_t* zeros, double* loss);

/* ---- NVIDIA GPUs ----
 *
 * The same verbs over device pointers, from the same line layout. liblowbit_cuda.so is opened on the first of these
 * calls; with no such library, no driver or no device they are LOWBIT_UNSUPPORTED with what was built, what was found
 * and what to do. A call queues its work on the caller's stream and returns: it neither allocates nor waits, so it can
 * be captured in a CUDA graph, and errors of the device itself show where the caller next synchronises. Matrices,
 * operands and results lie on `device`; values (scales, perm, ternary bytes) are those lowbit_cuda_matrix_check passed:
 * a bad one gives bad numbers, never a read out of bounds. */
typedef struct lowbit_cuda_queue {
  int32_t device;
  void* stream; /* cudaStream_t; NULL is the default stream */
} lowbit_cuda_queue;

typedef struct lowbit_cuda_device {
  char name[128];
  int32_t arch; /* 10 * major + minor of the compute capability */
  int32_t multiprocessors;
  int32_t shared_per_block; /* bytes of shared memory that a block may have */
  int32_t shared_per_sm;    /* bytes of shared memory of a multiprocessor */
  int32_t driver, runtime;  /* CUDA versions: 13000 is 13.0 */
} lowbit_cuda_device;

/* "75 80 90a +PTX": the architectures that liblowbit_cuda.so was built for; "" when it cannot be opened. */
LOWBIT_API const char* lowbit_cuda_architectures(void);
LOWBIT_API lowbit_status lowbit_cuda_device_count(int32_t* count);
LOWBIT_API lowbit_status lowbit_cuda_describe(int32_t device, lowbit_cuda_device* description);

/* How a product will be computed: a pure function of the matrix, the number of tokens, the dtype and the device. */
typedef struct lowbit_cuda_plan {
  char kernel[32];        /* "int4_decode", "int4_tile", "trit_integer", "int4_plain" */
  int32_t prefers_unpack; /* 1: at this size unpacking and a dense product is the faster way (the caller's to take) */
  size_t workspace_bytes; /* device memory at a multiple of 256 that lowbit_cuda_matmul needs; 0: none */
  size_t zeroed_bytes;    /* so many of its first bytes must be zero before its first use; calls leave them so */
} lowbit_cuda_plan;

LOWBIT_API lowbit_status lowbit_cuda_matmul_plan(const lowbit_cuda_device* device, const lowbit_matrix* w,
                                                 int64_t tokens, lowbit_dtype dtype, lowbit_activations activations,
                                                 lowbit_cuda_plan* plan);

/* As lowbit_matmul. Of one kernel, a token's result does not depend on the other tokens; sums are in a fixed order. */
LOWBIT_API lowbit_status lowbit_cuda_matmul(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const void* x,
                                            lowbit_dtype dtype, int64_t tokens, int64_t x_stride, const void* bias,
                                            lowbit_dtype bias_dtype, void* y, int64_t y_stride,
                                            lowbit_activations activations, void* workspace, size_t workspace_bytes);

/* As lowbit_gather; an id outside [0, rows) gives a row of zeros (CLAMP: the nearest row). ERROR also writes the
 * smallest place of such an id to *first_bad, device memory that held INT64_MAX. padding_id (-1: none) always gives
 * zeros. */
LOWBIT_API lowbit_status lowbit_cuda_gather(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const void* ids,
                                            lowbit_dtype id_dtype, int64_t count, lowbit_id_policy policy,
                                            int64_t padding_id, int64_t* first_bad, void* out, lowbit_dtype out_dtype,
                                            int64_t out_stride);

/* As lowbit_gather_bags, the same bits; ids and first_bad as in lowbit_cuda_gather. A bag whose offsets decrease is
 * empty. */
LOWBIT_API lowbit_status lowbit_cuda_gather_bags(const lowbit_cuda_queue* queue, const lowbit_matrix* w,
                                                 const void* ids, lowbit_dtype id_dtype, int64_t count,
                                                 const int64_t* offsets, int64_t bags, const float* weights, int mean,
                                                 lowbit_id_policy policy, int64_t padding_id, int64_t* first_bad,
                                                 void* out, lowbit_dtype out_dtype, int64_t out_stride);

/* As lowbit_unpack, lowbit_unpack_codes and lowbit_pack_codes. A code that the format lacks is packed as its low bits
 * (trit: as 2), and the smallest such place goes to *first_bad (device memory that held INT64_MAX, or NULL). */
LOWBIT_API lowbit_status lowbit_cuda_unpack(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t row_begin,
                                            int64_t row_end, void* out, lowbit_dtype out_dtype, int64_t out_stride);
LOWBIT_API lowbit_status lowbit_cuda_unpack_codes(const lowbit_cuda_queue* queue, const lowbit_matrix* w,
                                                  int64_t row_begin, int64_t row_end, uint8_t* out);
LOWBIT_API lowbit_status lowbit_cuda_pack_codes(const lowbit_cuda_queue* queue, const lowbit_matrix* w,
                                                const uint8_t* codes, uint8_t* codes_out, int64_t* first_bad);

/* The values of a matrix, as lowbit_matrix_check(w, 1): the smallest place (index into its array) of a scale that is
 * not finite (trit: or is 0), of a zero too large, of a perm entry outside [0, cols) or equal to an earlier one, of a
 * byte that encodes no trits, each to bad[0..3], device memory that held INT64_MAX. workspace: 4 * cols bytes of device
 * memory, used when there is a perm. */
LOWBIT_API lowbit_status lowbit_cuda_matrix_check(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t* bad,
                                                  void* workspace, size_t workspace_bytes);

/* As lowbit_gptq_solve, over device memory: the same codes, scales and zeros. Weights and diagonals are the caller's to
 * check. With a NULL factor it is rounding to nearest. */
LOWBIT_API lowbit_status lowbit_cuda_gptq_workspace(const lowbit_gptq_options* options, int64_t rows, int64_t cols,
                                                    size_t* bytes);
LOWBIT_API lowbit_status lowbit_cuda_gptq_solve(const lowbit_cuda_queue* queue, const lowbit_gptq_options* options,
                                                int64_t rows, int64_t cols, const float* weight, const float* factor,
                                                const int32_t* group_index, uint8_t* codes, float* scales,
                                                uint8_t* zeros, double* loss, void* workspace, size_t workspace_bytes);

/* ---- the machine ---- */

/* "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vbmi avx512vnni": what the CPU has of what lowbit knows. */
LOWBIT_API const char* lowbit_cpu_features(void);

/* Restricts the choice of kernels: "auto", or the best level allowed: "ref", "avx2", "avxvnni", "avx512vnni", "amx". A
 * level this machine lacks is LOWBIT_UNSUPPORTED and changes nothing. At start the environment's LOWBIT_ISA is read; if
 * it is invalid, every verb fails with its message. */
LOWBIT_API lowbit_status lowbit_set_isa(const char* isa);
LOWBIT_API const char* lowbit_isa(void);

/* Why this machine does not offer a level, "the CPU lacks avxvnni"; "" if it does, NULL if there is no such level. For
 * "amx" the system is asked for the registers of its tiles, unless it was before: a sandbox may refuse them. */
LOWBIT_API const char* lowbit_isa_missing(const char* isa);

/* The kernel table, row by row: name as "int4_matmul__avx512vnni"; NULL past the end. runnable: its
 * level is offered. */
LOWBIT_API const char* lowbit_kernel_name(int index, int* runnable);

/* The kernel that a verb ("matmul", "gather", "bags", "activations", "store", "rms_norm", "silu_mul", "decode_attention")
 * would use now, or did last use on this thread; "" if there is none. */
LOWBIT_API const char* lowbit_selected_kernel(const char* verb, lowbit_format format);
LOWBIT_API const char* lowbit_last_kernel(const char* verb);

/* Read bandwidth of this machine in GB/s: the best of several plain and prefetching read loops over `bytes` of memory
 * on huge pages, with `threads` threads. What bench rows call the probe. 0 when memory is short. */
LOWBIT_API double lowbit_read_bandwidth(size_t bytes, int threads);

/* Multiply rate of this machine's vector or tile units in 10^9 operations a second (a multiplication and an addition are two),
 * with `threads` threads and everything in registers: the other side of a roofline. kind: "int8" (vpdpbusd, or what
 * AVX2 has for it), "bf16" (vdpbf16ps) or "tiles" (TDPBUSD of AMX). 0 for a kind that the machine lacks or that is no
 * kind. Takes about 30 ms. */
LOWBIT_API double lowbit_multiply_rate(const char* kind, int threads);

/* Threads the executor uses; 0 restores its default (OpenMP's, or the CPUs of this process). */
LOWBIT_API lowbit_status lowbit_set_threads(int threads);
LOWBIT_API int lowbit_threads(void);
LOWBIT_API const char* lowbit_executor(void); /* "openmp" or "std::thread" */

#if defined(__cplusplus)
}
#endif
#endif
