// lowbit._C: the C API for Python. Pointers come in as integers (a tensor's data_ptr), statuses leave as exceptions,
// the GIL is released around work. No tensor type and no framework header: any framework and version will do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <lowbit/lowbit.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "torch_kernels.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void raise(lowbit_status status) {
  if (status == LOWBIT_OK) return;
  const char* message = lowbit_last_error();
  switch (status) {
    case LOWBIT_OUT_OF_RANGE: PyErr_SetString(PyExc_IndexError, message); break;
    case LOWBIT_UNSUPPORTED: PyErr_SetString(PyExc_NotImplementedError, message); break;
    case LOWBIT_OUT_OF_MEMORY: PyErr_SetString(PyExc_MemoryError, message); break;
    case LOWBIT_NUMERIC: PyErr_SetString(PyExc_ArithmeticError, message); break;
    default: PyErr_SetString(PyExc_ValueError, message);
  }
  throw py::error_already_set();
}

template <class Call>
void run(Call call) {
  lowbit_status status;
  {
    py::gil_scoped_release release;  // the message is per thread, and this stays the same thread
    status = call();
  }
  raise(status);
}

// Memory of lowbit_alloc behind Python's buffer protocol: torch.frombuffer keeps it alive.
struct Buffer {
  void* memory;
  size_t bytes;

  explicit Buffer(size_t size) : memory(lowbit_alloc(size)), bytes(size) {
    if (!memory) {
      PyErr_Format(PyExc_MemoryError, "codes: no memory for %zu bytes", size);
      throw py::error_already_set();
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { lowbit_free(memory, bytes); }
};

// A view of a matrix and where its memory lies: the index of a GPU, or -1.
struct Matrix : lowbit_matrix {
  int32_t device;

  lowbit_cuda_queue queue(uintptr_t stream) const { return {device, pointer<void>(stream)}; }
};

// A decoder layer: matrices as they were when it was made, addresses of biases and norms. Whoever makes one keeps the memory
// alive.
struct DecoderLayer {
  Matrix matrices[7];
  lowbit_decoder_layer view{};

  DecoderLayer(const std::vector<Matrix>& linears, const std::vector<std::pair<uintptr_t, int>>& biases,
               const std::vector<int>& activations, const std::vector<std::pair<uintptr_t, float>>& norms) {
    if (linears.size() != 7 || biases.size() != 7 || activations.size() != 7 || norms.size() != 4)
      throw py::value_error("layer: expected 7 matrices, biases and activations, and 4 norms");
    lowbit_linear* const parts[] = {&view.q, &view.k, &view.v, &view.o, &view.gate, &view.up, &view.down};
    for (size_t i = 0; i < 7; i++) {
      if (linears[i].device >= 0) throw py::value_error("layer: expected matrices on the CPU");
      matrices[i] = linears[i];
      *parts[i] = {&matrices[i], pointer<const void>(biases[i].first), lowbit_dtype(biases[i].second),
                   lowbit_activations(activations[i])};
    }
    lowbit_norm* const places[] = {&view.input, &view.output, &view.q_norm, &view.k_norm};
    for (size_t i = 0; i < 4; i++) *places[i] = {pointer<const void>(norms[i].first), norms[i].second};
  }
  DecoderLayer(const DecoderLayer&) = delete;
  DecoderLayer& operator=(const DecoderLayer&) = delete;
};

// Layers that follow each other, and the norm after the last. decode: one token of each sequence, past the `past` places of
// every layer's cache.
struct DecoderStack {
  std::vector<const lowbit_decoder_layer*> layers;
  std::vector<lowbit_decode_step> steps;  // head sizes and scales
  lowbit_norm last;

  DecoderStack(const std::vector<const DecoderLayer*>& parts, const std::vector<std::pair<int64_t, float>>& heads,
               std::pair<uintptr_t, float> norm)
      : steps(heads.size()), last{pointer<const void>(norm.first), norm.second} {
    if (parts.empty() || parts.size() != heads.size())
      throw py::value_error("layers and heads: expected one of each for every layer");
    for (size_t i = 0; i < parts.size(); i++) {
      if (!parts[i]) throw py::value_error("layers: expected layers, got None");
      layers.push_back(&parts[i]->view);
      steps[i].head_size = heads[i].first;
      steps[i].scale = heads[i].second;
    }
  }
};

Matrix matrix(int format, int64_t rows, int64_t cols, int64_t group_size, uintptr_t codes, uintptr_t scales,
              int scale_dtype, int64_t scale_rows, int64_t scale_cols, uintptr_t zeros, uintptr_t perm,
              int32_t device) {
  Matrix w{};
  w.format = lowbit_format(format);
  w.rows = rows;
  w.cols = cols;
  w.group_size = group_size;
  w.codes = pointer<const uint8_t>(codes);
  w.scales = pointer<const void>(scales);
  w.scale_dtype = lowbit_dtype(scale_dtype);
  w.scale_rows = scale_rows;
  w.scale_cols = scale_cols;
  w.zeros = pointer<const uint8_t>(zeros);
  w.perm = pointer<const int32_t>(perm);
  w.device = device;
  return w;
}

lowbit_gptq_options gptq_options(int format, int64_t group_size, bool symmetric, bool clip, bool static_grids,
                                 int scale_dtype, int64_t block_size) {
  return {lowbit_format(format), group_size, symmetric, clip, static_grids, lowbit_dtype(scale_dtype), block_size};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Low-bit weight matrices: the C API of lowbit.h over raw addresses. Use lowbit.PackedMatrix.";
  m.attr("__version__") = lowbit_version();
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.attr("MAX_GROUP") = LOWBIT_MAX_GROUP;
  m.attr("F32") = int(LOWBIT_F32);
  m.attr("F16") = int(LOWBIT_F16);
  m.attr("BF16") = int(LOWBIT_BF16);
  m.attr("I32") = int(LOWBIT_I32);
  m.attr("I64") = int(LOWBIT_I64);

  py::class_<Buffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& b) {
        return py::buffer_info(b.memory, 1, py::format_descriptor<uint8_t>::format(), 1, {py::ssize_t(b.bytes)},
                               {py::ssize_t(1)});
      });

  // A view of a matrix: addresses and shapes. Whoever makes one keeps the memory alive.
  // The verbs of a GPU have the prefix cuda_ and queue their work on a stream (0: the default one) of the matrix's own.
  py::class_<Matrix>(m, "Matrix")
      .def(py::init(&matrix), py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("group_size"),
           py::arg("codes"), py::arg("scales"), py::arg("scale_dtype"), py::arg("scale_rows"), py::arg("scale_cols"),
           py::arg("zeros"), py::arg("perm"), py::arg("device") = -1)
      .def_readonly("rows", &Matrix::rows)
      .def_readonly("cols", &Matrix::cols)
      .def_readonly("device", &Matrix::device)
      .def(
          "check",
          [](const Matrix& w, bool values) {
            lowbit_matrix view = w;
            if (w.device >= 0) view.perm = nullptr;  // its numbers are cuda_check's to read
            run([&] { return lowbit_matrix_check(&view, values && w.device < 0); });
          },
          py::arg("values"))
      .def(
          "pack_codes",
          [](const Matrix& w, uintptr_t codes, uintptr_t out) {
            run([&] { return lowbit_pack_codes(&w, pointer<const uint8_t>(codes), pointer<uint8_t>(out)); });
          },
          py::arg("codes"), py::arg("out"))
      .def(
          "unpack_codes",
          [](const Matrix& w, int64_t begin, int64_t end, uintptr_t out) {
            run([&] { return lowbit_unpack_codes(&w, begin, end, pointer<uint8_t>(out)); });
          },
          py::arg("begin"), py::arg("end"), py::arg("out"))
      .def(
          "unpack",
          [](const Matrix& w, int64_t begin, int64_t end, uintptr_t out, int dtype, int64_t stride) {
            run([&] { return lowbit_unpack(&w, begin, end, pointer<void>(out), lowbit_dtype(dtype), stride); });
          },
          py::arg("begin"), py::arg("end"), py::arg("out"), py::arg("dtype"), py::arg("stride"))
      .def(
          "matmul",
          [](const Matrix& w, uintptr_t x, int dtype, int64_t tokens, int64_t x_stride, uintptr_t bias, int bias_dtype,
             uintptr_t y, int64_t y_stride, int activations) {
            run([&] {
              return lowbit_matmul(&w, pointer<const void>(x), lowbit_dtype(dtype), tokens, x_stride,
                                   pointer<const void>(bias), lowbit_dtype(bias_dtype), pointer<void>(y), y_stride,
                                   lowbit_activations(activations), nullptr, 0);
            });
          },
          py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("x_stride"), py::arg("bias"),
          py::arg("bias_dtype"), py::arg("y"), py::arg("y_stride"), py::arg("activations"))
      .def(
          "gather",
          [](const Matrix& w, uintptr_t ids, int id_dtype, int64_t count, int policy, uintptr_t out, int out_dtype,
             int64_t out_stride) {
            run([&] {
              return lowbit_gather(&w, pointer<const void>(ids), lowbit_dtype(id_dtype), count,
                                   lowbit_id_policy(policy), pointer<void>(out), lowbit_dtype(out_dtype), out_stride);
            });
          },
          py::arg("ids"), py::arg("id_dtype"), py::arg("count"), py::arg("policy"), py::arg("out"),
          py::arg("out_dtype"), py::arg("out_stride"))
      .def(
          "gather_bags",
          [](const Matrix& w, uintptr_t ids, int id_dtype, int64_t count, uintptr_t offsets, int64_t bags,
             uintptr_t weights, bool mean, int policy, int64_t padding_id, uintptr_t out, int out_dtype,
             int64_t out_stride) {
            run([&] {
              return lowbit_gather_bags(&w, pointer<const void>(ids), lowbit_dtype(id_dtype), count,
                                        pointer<const int64_t>(offsets), bags, pointer<const float>(weights), mean,
                                        lowbit_id_policy(policy), padding_id, nullptr, pointer<void>(out),
                                        lowbit_dtype(out_dtype), out_stride);
            });
          },
          py::arg("ids"), py::arg("id_dtype"), py::arg("count"), py::arg("offsets"), py::arg("bags"),
          py::arg("weights"), py::arg("mean"), py::arg("policy"), py::arg("padding_id"), py::arg("out"),
          py::arg("out_dtype"), py::arg("out_stride"))
      .def(
          "cuda_check",
          [](const Matrix& w, uintptr_t stream, uintptr_t bad, uintptr_t workspace, size_t workspace_bytes) {
            const lowbit_cuda_queue queue = w.queue(stream);
            run([&] {
              return lowbit_cuda_matrix_check(&queue, &w, pointer<int64_t>(bad), pointer<void>(workspace),
                                              workspace_bytes);
            });
          },
          py::arg("stream"), py::arg("bad"), py::arg("workspace"), py::arg("workspace_bytes"))
      .def(
          "cuda_pack_codes",
          [](const Matrix& w, uintptr_t stream, uintptr_t codes, uintptr_t out, uintptr_t first_bad) {
            const lowbit_cuda_queue queue = w.queue(stream);
            run([&] {
              return lowbit_cuda_pack_codes(&queue, &w, pointer<const uint8_t>(codes), pointer<uint8_t>(out),
                                            pointer<int64_t>(first_bad));
            });
          },
          py::arg("stream"), py::arg("codes"), py::arg("out"), py::arg("first_bad"))
      .def(
          "cuda_unpack_codes",
          [](const Matrix& w, uintptr_t stream, int64_t begin, int64_t end, uintptr_t out) {
            const lowbit_cuda_queue queue = w.queue(stream);
            run([&] { return lowbit_cuda_unpack_codes(&queue, &w, begin, end, pointer<uint8_t>(out)); });
          },
          py::arg("stream"), py::arg("begin"), py::arg("end"), py::arg("out"))
      .def(
          "cuda_unpack",
          [](const Matrix& w, uintptr_t stream, int64_t begin, int64_t end, uintptr_t out, int dtype, int64_t stride) {
            const lowbit_cuda_queue queue = w.queue(stream);
            run([&] {
              return lowbit_cuda_unpack(&queue, &w, begin, end, pointer<void>(out), lowbit_dtype(dtype), stride);
            });
          },
          py::arg("stream"), py::arg("begin"), py::arg("end"), py::arg("out"), py::arg("dtype"), py::arg("stride"))
      .def(
          "cuda_matmul_plan",
          [](const Matrix& w, int64_t tokens, int dtype, int activations) {
            lowbit_cuda_plan plan;
            run([&] {
              lowbit_cuda_device device;
              const lowbit_status status = lowbit_cuda_describe(w.device, &device);
              return status != LOWBIT_OK ? status
                                         : lowbit_cuda_matmul_plan(&device, &w, tokens, lowbit_dtype(dtype),
                                                                   lowbit_activations(activations), &plan);
            });
            return std::make_tuple(std::string(plan.kernel), plan.prefers_unpack != 0, plan.workspace_bytes,
                                   plan.zeroed_bytes);
          },
          py::arg("tokens"), py::arg("dtype"), py::arg("activations"))
      .def(
          "cuda_matmul",
          [](const Matrix& w, uintptr_t stream, uintptr_t x, int dtype, int64_t tokens, int64_t x_stride,
             uintptr_t bias, int bias_dtype, uintptr_t y, int64_t y_stride, int activations, uintptr_t workspace,
             size_t workspace_bytes) {
            const lowbit_cuda_queue queue = w.queue(stream);
            run([&] {
              return lowbit_cuda_matmul(&queue, &w, pointer<const void>(x), lowbit_dtype(dtype), tokens, x_stride,
                                        pointer<const void>(bias), lowbit_dtype(bias_dtype), pointer<void>(y), y_stride,
                                        lowbit_activations(activations), pointer<void>(workspace), workspace_bytes);
            });
          },
          py::arg("stream"), py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("x_stride"), py::arg("bias"),
          py::arg("bias_dtype"), py::arg("y"), py::arg("y_stride"), py::arg("activations"), py::arg("workspace"),
          py::arg("workspace_bytes"))
      .def(
          "cuda_gather",
          [](const Matrix& w, uintptr_t stream, uintptr_t ids, int id_dtype, int64_t count, int policy,
             int64_t padding_id, uintptr_t first_bad, uintptr_t out, int out_dtype, int64_t out_stride) {
            const lowbit_cuda_queue queue = w.queue(stream);
            run([&] {
              return lowbit_cuda_gather(&queue, &w, pointer<const void>(ids), lowbit_dtype(id_dtype), count,
                                        lowbit_id_policy(policy), padding_id, pointer<int64_t>(first_bad),
                                        pointer<void>(out), lowbit_dtype(out_dtype), out_stride);
            });
          },
          py::arg("stream"), py::arg("ids"), py::arg("id_dtype"), py::arg("count"), py::arg("policy"),
          py::arg("padding_id"), py::arg("first_bad"), py::arg("out"), py::arg("out_dtype"), py::arg("out_stride"))
      .def(
          "cuda_gather_bags",
          [](const Matrix& w, uintptr_t stream, uintptr_t ids, int id_dtype, int64_t count, uintptr_t offsets,
             int64_t bags, uintptr_t weights, bool mean, int policy, int64_t padding_id, uintptr_t first_bad,
             uintptr_t out, int out_dtype, int64_t out_stride) {
            const lowbit_cuda_queue queue = w.queue(stream);
            run([&] {
              return lowbit_cuda_gather_bags(&queue, &w, pointer<const void>(ids), lowbit_dtype(id_dtype), count,
                                             pointer<const int64_t>(offsets), bags, pointer<const float>(weights), mean,
                                             lowbit_id_policy(policy), padding_id, pointer<int64_t>(first_bad),
                                             pointer<void>(out), lowbit_dtype(out_dtype), out_stride);
            });
          },
          py::arg("stream"), py::arg("ids"), py::arg("id_dtype"), py::arg("count"), py::arg("offsets"), py::arg("bags"),
          py::arg("weights"), py::arg("mean"), py::arg("policy"), py::arg("padding_id"), py::arg("first_bad"),
          py::arg("out"), py::arg("out_dtype"), py::arg("out_stride"));

  m.def(
      "row_lines", [](int format, int64_t cols) { return lowbit_row_lines(lowbit_format(format), cols); },
      py::arg("format"), py::arg("cols"));
  m.def(
      "pack_float",
      [](int format, int64_t rows, int64_t cols, int64_t group_size, uintptr_t src, int src_dtype, int64_t src_stride,
         int scale_dtype, bool clip, uintptr_t codes, uintptr_t scales, uintptr_t zeros) {
        run([&] {
          return lowbit_pack_float(lowbit_format(format), rows, cols, group_size, pointer<const void>(src),
                                   lowbit_dtype(src_dtype), src_stride, lowbit_dtype(scale_dtype), clip,
                                   pointer<uint8_t>(codes), pointer<void>(scales), pointer<uint8_t>(zeros));
        });
      },
      py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("group_size"), py::arg("src"), py::arg("src_dtype"),
      py::arg("src_stride"), py::arg("scale_dtype"), py::arg("clip"), py::arg("codes"), py::arg("scales"),
      py::arg("zeros"));

  m.def(
      "gptq_solve",
      [](int format, int64_t rows, int64_t cols, int64_t group_size, bool symmetric, bool clip, bool static_grids,
         int scale_dtype, int64_t block_size, uintptr_t weight, uintptr_t factor, uintptr_t group_index,
         uintptr_t codes, uintptr_t scales, uintptr_t zeros, uintptr_t loss) {
        const auto options = gptq_options(format, group_size, symmetric, clip, static_grids, scale_dtype, block_size);
        run([&] {
          return lowbit_gptq_solve(&options, rows, cols, pointer<const float>(weight), pointer<const float>(factor),
                                   pointer<const int32_t>(group_index), pointer<uint8_t>(codes), pointer<float>(scales),
                                   pointer<uint8_t>(zeros), pointer<double>(loss));
        });
      },
      py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("group_size"), py::arg("symmetric"), py::arg("clip"),
      py::arg("static_grids"), py::arg("scale_dtype"), py::arg("block_size"), py::arg("weight"), py::arg("factor"),
      py::arg("group_index"), py::arg("codes"), py::arg("scales"), py::arg("zeros"), py::arg("loss"));

  // The GPUs. NotImplementedError where there is none, but from cuda_architectures.
  m.def("cuda_architectures", [] { return std::string(lowbit_cuda_architectures()); });
  m.def("cuda_device_count", [] {
    int32_t count = 0;
    run([&] { return lowbit_cuda_device_count(&count); });
    return count;
  });
  m.def(
      "cuda_describe",
      [](int32_t device) {
        lowbit_cuda_device description;
        run([&] { return lowbit_cuda_describe(device, &description); });
        return py::dict(
            "name"_a = description.name, "arch"_a = description.arch, "multiprocessors"_a = description.multiprocessors,
            "shared_per_block"_a = description.shared_per_block, "shared_per_sm"_a = description.shared_per_sm,
            "driver"_a = description.driver, "runtime"_a = description.runtime);
      },
      py::arg("device"));
  m.def(
      "cuda_gptq_workspace",
      [](int format, int64_t rows, int64_t cols, int64_t group_size, bool symmetric, bool clip, bool static_grids,
         int scale_dtype, int64_t block_size) {
        const auto options = gptq_options(format, group_size, symmetric, clip, static_grids, scale_dtype, block_size);
        size_t bytes = 0;
        run([&] { return lowbit_cuda_gptq_workspace(&options, rows, cols, &bytes); });
        return bytes;
      },
      py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("group_size"), py::arg("symmetric"), py::arg("clip"),
      py::arg("static_grids"), py::arg("scale_dtype"), py::arg("block_size"));
  m.def(
      "cuda_gptq_solve",
      [](int32_t device, uintptr_t stream, int format, int64_t rows, int64_t cols, int64_t group_size, bool symmetric,
         bool clip, bool static_grids, int scale_dtype, int64_t block_size, uintptr_t weight, uintptr_t factor,
         uintptr_t group_index, uintptr_t codes, uintptr_t scales, uintptr_t zeros, uintptr_t loss, uintptr_t workspace,
         size_t workspace_bytes) {
        const auto options = gptq_options(format, group_size, symmetric, clip, static_grids, scale_dtype, block_size);
        const lowbit_cuda_queue queue = {device, pointer<void>(stream)};
        run([&] {
          return lowbit_cuda_gptq_solve(&queue, &options, rows, cols, pointer<const float>(weight),
                                        pointer<const float>(factor), pointer<const int32_t>(group_index),
                                        pointer<uint8_t>(codes), pointer<float>(scales), pointer<uint8_t>(zeros),
                                        pointer<double>(loss), pointer<void>(workspace), workspace_bytes);
        });
      },
      py::arg("device"), py::arg("stream"), py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("group_size"),
      py::arg("symmetric"), py::arg("clip"), py::arg("static_grids"), py::arg("scale_dtype"), py::arg("block_size"),
      py::arg("weight"), py::arg("factor"), py::arg("group_index"), py::arg("codes"), py::arg("scales"),
      py::arg("zeros"), py::arg("loss"), py::arg("workspace"), py::arg("workspace_bytes"));

  m.def(
      "gptq_read_weight",
      [](int bits, int64_t rows, int64_t cols, uintptr_t words, uintptr_t codes) {
        run([&] {
          return lowbit_gptq_read_weight(bits, rows, cols, pointer<const int32_t>(words), pointer<uint8_t>(codes));
        });
      },
      py::arg("bits"), py::arg("rows"), py::arg("cols"), py::arg("qweight"), py::arg("codes"));
  m.def(
      "gptq_write_weight",
      [](int bits, int64_t rows, int64_t cols, uintptr_t codes, uintptr_t words) {
        run([&] {
          return lowbit_gptq_write_weight(bits, rows, cols, pointer<const uint8_t>(codes), pointer<int32_t>(words));
        });
      },
      py::arg("bits"), py::arg("rows"), py::arg("cols"), py::arg("codes"), py::arg("qweight"));
  m.def(
      "gptq_read_zeros",
      [](int bits, int version, int64_t rows, int64_t groups, uintptr_t words, uintptr_t zeros) {
        run([&] {
          return lowbit_gptq_read_zeros(bits, version, rows, groups, pointer<const int32_t>(words),
                                        pointer<uint8_t>(zeros));
        });
      },
      py::arg("bits"), py::arg("version"), py::arg("rows"), py::arg("groups"), py::arg("qzeros"), py::arg("zeros"));
  m.def(
      "gptq_write_zeros",
      [](int bits, int version, int64_t rows, int64_t groups, uintptr_t zeros, uintptr_t words) {
        run([&] {
          return lowbit_gptq_write_zeros(bits, version, rows, groups, pointer<const uint8_t>(zeros),
                                         pointer<int32_t>(words));
        });
      },
      py::arg("bits"), py::arg("version"), py::arg("rows"), py::arg("groups"), py::arg("zeros"), py::arg("qzeros"));

  m.def(
      "matmul_group",
      [](const std::vector<const Matrix*>& matrices, const std::vector<std::pair<uintptr_t, int>>& biases,
         const std::vector<uintptr_t>& ys, uintptr_t x, int dtype, int64_t tokens, int64_t x_stride, int activations) {
        if (matrices.size() > LOWBIT_MAX_GROUP || biases.size() != matrices.size() || ys.size() != matrices.size())
          throw py::value_error("products: expected at most " + std::to_string(LOWBIT_MAX_GROUP) +
                                " matrices with a bias and an output each");
        lowbit_product products[LOWBIT_MAX_GROUP];
        for (size_t i = 0; i < matrices.size(); i++)
          products[i] = {matrices[i], pointer<const void>(biases[i].first), lowbit_dtype(biases[i].second),
                         pointer<void>(ys[i]), matrices[i]->rows};
        run([&] {
          return lowbit_matmul_group(products, int(matrices.size()), pointer<const void>(x), lowbit_dtype(dtype),
                                     tokens, x_stride, lowbit_activations(activations), nullptr, 0);
        });
      },
      py::arg("matrices"), py::arg("biases"), py::arg("ys"), py::arg("x"), py::arg("dtype"), py::arg("tokens"),
      py::arg("x_stride"), py::arg("activations"));

  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, float eps, int dtype, int64_t tokens, int64_t size,
         uintptr_t sum, uintptr_t y) {
        run([&] {
          return lowbit_rms_norm(pointer<const void>(x), size, pointer<const void>(residual), size,
                                 pointer<const void>(weight), eps, lowbit_dtype(dtype), tokens, size,
                                 pointer<void>(sum), size, pointer<void>(y), size);
        });
      },
      py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("eps"), py::arg("dtype"), py::arg("tokens"),
      py::arg("size"), py::arg("sum"), py::arg("y"));
  m.def(
      "silu_mul",
      [](uintptr_t gate, uintptr_t up, int dtype, int64_t tokens, int64_t size, uintptr_t y) {
        run([&] {
          return lowbit_silu_mul(pointer<const void>(gate), size, pointer<const void>(up), size, lowbit_dtype(dtype),
                                 tokens, size, pointer<void>(y), size);
        });
      },
      py::arg("gate"), py::arg("up"), py::arg("dtype"), py::arg("tokens"), py::arg("size"), py::arg("y"));

  py::class_<DecoderLayer>(m, "DecoderLayer")
      .def(py::init<const std::vector<Matrix>&, const std::vector<std::pair<uintptr_t, int>>&, const std::vector<int>&,
                    const std::vector<std::pair<uintptr_t, float>>&>(),
           py::arg("matrices"), py::arg("biases"), py::arg("activations"), py::arg("norms"));

  py::class_<DecoderStack>(m, "DecoderStack")
      .def(py::init<const std::vector<const DecoderLayer*>&, const std::vector<std::pair<int64_t, float>>&,
                    std::pair<uintptr_t, float>>(),
           py::arg("layers"), py::arg("heads"), py::arg("norm"), py::keep_alive<1, 2>())
      .def(
          "decode",
          [](const DecoderStack& stack, int dtype, int64_t sequences, uintptr_t x, uintptr_t y, int64_t past,
             uintptr_t cos, uintptr_t sin, int64_t angle_stride,
             const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>>& caches) {
            if (caches.size() != stack.layers.size()) throw py::value_error("caches: expected one for every layer");
            std::vector<lowbit_decode_step> steps = stack.steps;  // another thread may decode as well
            for (size_t i = 0; i < steps.size(); i++) {
              lowbit_decode_step& step = steps[i];
              step.dtype = lowbit_dtype(dtype);
              step.sequences = sequences;
              step.past = past;
              step.cos = pointer<const void>(cos);
              step.sin = pointer<const void>(sin);
              step.angle_stride = angle_stride;
              const auto& [keys, values, sequence_stride, head_stride] = caches[i];
              step.keys = pointer<void>(keys);
              step.values = pointer<void>(values);
              step.cache_sequence_stride = sequence_stride;
              step.cache_head_stride = head_stride;
            }
            run([&] {
              return lowbit_decode_layers(stack.layers.data(), steps.data(), int(steps.size()), &stack.last,
                                          pointer<const void>(x), pointer<void>(y));
            });
          },
          py::arg("dtype"), py::arg("sequences"), py::arg("x"), py::arg("y"), py::arg("past"), py::arg("cos"),
          py::arg("sin"), py::arg("angle_stride"), py::arg("caches"));

  m.def("cpu_features", [] { return std::string(lowbit_cpu_features()); });
  m.def("isa", [] { return std::string(lowbit_isa()); });
  m.def("set_isa", [](const std::string& isa) { raise(lowbit_set_isa(isa.c_str())); }, py::arg("isa"));
  m.def(
      "isa_missing",
      [](const std::string& isa) -> std::optional<std::string> {
        const char* reason = lowbit_isa_missing(isa.c_str());
        return reason ? std::optional<std::string>(reason) : std::nullopt;
      },
      py::arg("isa"));
  m.def(
      "matmul_batching",
      [](int format, int activations) {
        int64_t batch = 0, tiles_from = 0;
        raise(lowbit_matmul_batching(lowbit_format(format), lowbit_activations(activations), &batch, &tiles_from));
        return std::make_tuple(batch, tiles_from);
      },
      py::arg("format"), py::arg("activations"));
  m.def(
      "matmul_sharing",
      [](int format, int64_t tokens, int activations) {
        int64_t columns = 0;
        raise(lowbit_matmul_sharing(lowbit_format(format), tokens, lowbit_activations(activations), &columns));
        return columns;
      },
      py::arg("format"), py::arg("tokens"), py::arg("activations"));
  m.def(
      "set_matmul_blocking",
      [](int format, int64_t tiles_from, int64_t own_digit_bytes) {
        raise(lowbit_set_matmul_blocking(lowbit_format(format), tiles_from, own_digit_bytes));
      },
      py::arg("format"), py::arg("tiles_from"), py::arg("own_digit_bytes"));
  m.def("kernels", [] {
    std::vector<std::pair<std::string, bool>> rows;
    int runnable = 0;
    for (int i = 0; const char* name = lowbit_kernel_name(i, &runnable); i++) rows.emplace_back(name, runnable != 0);
    return rows;
  });
  m.def(
      "selected_kernel",
      [](const std::string& verb, int format) {
        return std::string(lowbit_selected_kernel(verb.c_str(), lowbit_format(format)));
      },
      py::arg("verb"), py::arg("format"));
  m.def(
      "last_kernel", [](const std::string& verb) { return std::string(lowbit_last_kernel(verb.c_str())); },
      py::arg("verb"));
  m.def("set_threads", [](int threads) { raise(lowbit_set_threads(threads)); }, py::arg("threads"));
  m.def("threads", &lowbit_threads);
  m.def("executor", [] { return std::string(lowbit_executor()); });
  m.def(
      "read_bandwidth",
      [](size_t bytes, int threads) {
        py::gil_scoped_release release;
        return lowbit_read_bandwidth(bytes, threads);
      },
      py::arg("bytes"), py::arg("threads"));
  m.def(
      "multiply_rate",
      [](const std::string& kind, int threads) {
        py::gil_scoped_release release;
        return lowbit_multiply_rate(kind.c_str(), threads);
      },
      py::arg("kind"), py::arg("threads"));

  bind_torch_kernels(m);
}
