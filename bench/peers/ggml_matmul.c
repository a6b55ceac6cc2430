// Products of ggml's CPU backend for ggml.py: several copies of one matrix in one quantized type, one graph a copy and a
// number of tokens. Built by ggml.py against a build of ggml (GGML_ROOT); only ggml's public API is used.
#include <stdlib.h>
#include <string.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

typedef struct {
  ggml_backend_t backend;
  struct ggml_context* weights;
  ggml_backend_buffer_t buffer;
  struct ggml_tensor** copy;
  int copies;
  int64_t cols, rows;
} Matrices;

typedef struct {
  struct ggml_context* context;
  ggml_backend_buffer_t buffer;
  struct ggml_tensor *x, *y;
  struct ggml_cgraph** graph;  // one a copy, all of the same x
} Products;

// The buffer of repacked weights, the layout that llama.cpp itself chooses on x86 for Q4_0 and Q4_K (a type without one
// must not be put into it).
static ggml_backend_buffer_type_t repacked(ggml_backend_t backend) {
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  ggml_backend_reg_t reg = device ? ggml_backend_dev_backend_reg(device) : NULL;
  ggml_backend_dev_get_extra_bufts_t extra =
      reg ? (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(reg,
                                                                                  "ggml_backend_dev_get_extra_bufts")
          : NULL;
  ggml_backend_buffer_type_t* list = extra ? extra(device) : NULL;
  for (; list && *list; list++)
    if (!strcmp(ggml_backend_buft_name(*list), "CPU_REPACK")) return *list;
  return NULL;
}

// Quantizes weights [rows][cols] to a type and makes `copies` of them. NULL when there is no memory.
Matrices* peer_open(const char* type_name, int64_t cols, int64_t rows, const float* weights, int copies, int threads,
                    int repack) {
  enum ggml_type type = GGML_TYPE_COUNT;
  for (int i = 0; i < GGML_TYPE_COUNT; i++)
    if (ggml_type_name((enum ggml_type)i) && !strcmp(ggml_type_name((enum ggml_type)i), type_name))
      type = (enum ggml_type)i;
  if (type == GGML_TYPE_COUNT || cols % ggml_blck_size(type)) return NULL;
  Matrices* m = calloc(1, sizeof *m);
  m->cols = cols, m->rows = rows, m->copies = copies;
  m->backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(m->backend, threads);
  m->weights = ggml_init((struct ggml_init_params){ggml_tensor_overhead() * (size_t)(copies + 1), NULL, true});
  m->copy = calloc((size_t)copies, sizeof *m->copy);
  for (int i = 0; i < copies; i++) m->copy[i] = ggml_new_tensor_2d(m->weights, type, cols, rows);
  ggml_backend_buffer_type_t where = repack ? repacked(m->backend) : ggml_backend_cpu_buffer_type();
  m->buffer = where ? ggml_backend_alloc_ctx_tensors_from_buft(m->weights, where) : NULL;
  const size_t bytes = ggml_row_size(type, cols) * (size_t)rows;
  void* quantized = malloc(bytes);
  if (!m->buffer || !quantized) return NULL;
  ggml_quantize_chunk(type, weights, quantized, 0, rows, cols, NULL);
  for (int i = 0; i < copies; i++) ggml_backend_tensor_set(m->copy[i], quantized, 0, bytes);
  free(quantized);
  return m;
}

int64_t peer_bytes(const Matrices* m) { return (int64_t)ggml_nbytes(m->copy[0]); }

Products* peer_products(Matrices* m, const float* x, int64_t tokens) {
  Products* p = calloc(1, sizeof *p);
  const size_t graph_bytes = ggml_graph_overhead_custom(8, false);
  p->context = ggml_init(
      (struct ggml_init_params){(ggml_tensor_overhead() + graph_bytes) * (size_t)(m->copies + 2), NULL, true});
  p->x = ggml_new_tensor_2d(p->context, GGML_TYPE_F32, m->cols, tokens);
  p->graph = calloc((size_t)m->copies, sizeof *p->graph);
  for (int i = 0; i < m->copies; i++) {
    struct ggml_tensor* y = ggml_mul_mat(p->context, m->copy[i], p->x);
    if (i == 0) p->y = y;
    p->graph[i] = ggml_new_graph_custom(p->context, 8, false);
    ggml_build_forward_expand(p->graph[i], y);
  }
  p->buffer = ggml_backend_alloc_ctx_tensors(p->context, m->backend);
  if (!p->buffer) return NULL;
  ggml_backend_tensor_set(p->x, x, 0, ggml_nbytes(p->x));
  return p;
}

int peer_run(Matrices* m, Products* p, int copy) {
  return ggml_backend_graph_compute(m->backend, p->graph[copy]) == GGML_STATUS_SUCCESS;
}

void peer_result(Products* p, float* y) { ggml_backend_tensor_get(p->y, y, 0, ggml_nbytes(p->y)); }

// Row by row, what the first copy holds; only for types that are not repacked.
void peer_dense(const Matrices* m, float* out) {
  const struct ggml_tensor* t = m->copy[0];
  const struct ggml_type_traits* traits = ggml_get_type_traits(t->type);
  for (int64_t n = 0; n < m->rows; n++)
    traits->to_float((const char*)t->data + n * (int64_t)t->nb[1], out + n * m->cols, m->cols);
}

void peer_free_products(Products* p) {
  ggml_backend_buffer_free(p->buffer);
  ggml_free(p->context);
  free(p->graph);
  free(p);
}

void peer_close(Matrices* m) {
  ggml_backend_buffer_free(m->buffer);
  ggml_free(m->weights);
  ggml_backend_free(m->backend);
  free(m->copy);
  free(m);
}
