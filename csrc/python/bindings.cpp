// lowbit._C: the C API for Python. Pointers come in as integers (a tensor's data_ptr), statuses leave as exceptions,
// the GIL is released around work. No tensor type and no framework header: any framework and version will do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <lowbit/lowbit.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace py = pybind11;

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

lowbit_matrix matrix(int format, int64_t rows, int64_t cols, int64_t group_size, uintptr_t codes, uintptr_t scales,
                     int scale_dtype, int64_t scale_rows, int64_t scale_cols, uintptr_t zeros, uintptr_t perm) {
  lowbit_matrix w{};
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
  return w;
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
  py::class_<lowbit_matrix>(m, "Matrix")
      .def(py::init(&matrix), py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("group_size"),
           py::arg("codes"), py::arg("scales"), py::arg("scale_dtype"), py::arg("scale_rows"), py::arg("scale_cols"),
           py::arg("zeros"), py::arg("perm"))
      .def_readonly("rows", &lowbit_matrix::rows)
      .def_readonly("cols", &lowbit_matrix::cols)
      .def(
          "check", [](const lowbit_matrix& w, bool values) { run([&] { return lowbit_matrix_check(&w, values); }); },
          py::arg("values"))
      .def(
          "pack_codes",
          [](const lowbit_matrix& w, uintptr_t codes, uintptr_t out) {
            run([&] { return lowbit_pack_codes(&w, pointer<const uint8_t>(codes), pointer<uint8_t>(out)); });
          },
          py::arg("codes"), py::arg("out"))
      .def(
          "unpack_codes",
          [](const lowbit_matrix& w, int64_t begin, int64_t end, uintptr_t out) {
            run([&] { return lowbit_unpack_codes(&w, begin, end, pointer<uint8_t>(out)); });
          },
          py::arg("begin"), py::arg("end"), py::arg("out"))
      .def(
          "unpack",
          [](const lowbit_matrix& w, int64_t begin, int64_t end, uintptr_t out, int dtype, int64_t stride) {
            run([&] { return lowbit_unpack(&w, begin, end, pointer<void>(out), lowbit_dtype(dtype), stride); });
          },
          py::arg("begin"), py::arg("end"), py::arg("out"), py::arg("dtype"), py::arg("stride"))
      .def(
          "matmul",
          [](const lowbit_matrix& w, uintptr_t x, int dtype, int64_t tokens, int64_t x_stride, uintptr_t bias,
             int bias_dtype, uintptr_t y, int64_t y_stride, int activations) {
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
          [](const lowbit_matrix& w, uintptr_t ids, int id_dtype, int64_t count, int policy, uintptr_t out,
             int out_dtype, int64_t out_stride) {
            run([&] {
              return lowbit_gather(&w, pointer<const void>(ids), lowbit_dtype(id_dtype), count,
                                   lowbit_id_policy(policy), pointer<void>(out), lowbit_dtype(out_dtype), out_stride);
            });
          },
          py::arg("ids"), py::arg("id_dtype"), py::arg("count"), py::arg("policy"), py::arg("out"),
          py::arg("out_dtype"), py::arg("out_stride"));

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
        const lowbit_gptq_options options = {lowbit_format(format),     group_size, symmetric, clip, static_grids,
                                             lowbit_dtype(scale_dtype), block_size};
        run([&] {
          return lowbit_gptq_solve(&options, rows, cols, pointer<const float>(weight), pointer<const float>(factor),
                                   pointer<const int32_t>(group_index), pointer<uint8_t>(codes), pointer<float>(scales),
                                   pointer<uint8_t>(zeros), pointer<double>(loss));
        });
      },
      py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("group_size"), py::arg("symmetric"), py::arg("clip"),
      py::arg("static_grids"), py::arg("scale_dtype"), py::arg("block_size"), py::arg("weight"), py::arg("factor"),
      py::arg("group_index"), py::arg("codes"), py::arg("scales"), py::arg("zeros"), py::arg("loss"));

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

  m.def("cpu_features", [] { return std::string(lowbit_cpu_features()); });
  m.def("isa", [] { return std::string(lowbit_isa()); });
  m.def("set_isa", [](const std::string& isa) { raise(lowbit_set_isa(isa.c_str())); }, py::arg("isa"));
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
}
