// The operators lowbit::gather and lowbit::matmul on CPU tensors, as torch's dispatcher calls them: without Python on the
// way, which took longer than looking a row up.
//
// Over torch's stable C ABI (torch/csrc/stable/c/shim.h, kept from 2.10 on), whose functions are looked up in the torch
// that the process has loaded: nothing is linked against it and no header of it is read. Where they are missing nothing
// is registered, and the operators stay in Python (lowbit/ops.py).
//
// A kernel here takes the plain case alone: tensors on the CPU, contiguous, of the right dtypes and shapes. Everything
// else and every error goes to the same operator in Python, "lowbit::_gather" for "lowbit::gather", with the arguments
// untouched; so there is one place for checks and their messages.
#include "torch_kernels.h"

#include <dlfcn.h>

#include <lowbit/lowbit.h>

#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

// ---- what of torch is used, under its names ----

using Value = uint64_t;  // StableIValue: a number, or a pointer to what is owned by whoever holds the value
using Handle = void*;    // of a tensor, a library, a string
using Kernel = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);

constexpr uint64_t version(uint64_t major, uint64_t minor) { return major << 56 | minor << 48; }
constexpr uint64_t kSpoken = version(2, 10);  // strings came with it; later torches speak it to those who name it

#define TORCH_FUNCTIONS(FUNCTION)                                                                             \
  FUNCTION(uint64_t, aoti_torch_abi_version, ())                                                              \
  FUNCTION(int32_t, aoti_torch_library_init_impl, (const char*, const char*, const char*, uint32_t, Handle*)) \
  FUNCTION(int32_t, torch_library_impl, (Handle, const char*, Kernel, uint64_t))                              \
  FUNCTION(int32_t, torch_call_dispatcher, (const char*, const char*, Value*, uint64_t))                      \
  FUNCTION(int32_t, aoti_torch_get_data_ptr, (Handle, void**))                                                \
  FUNCTION(int32_t, aoti_torch_get_dim, (Handle, int64_t*))                                                   \
  FUNCTION(int32_t, aoti_torch_get_sizes, (Handle, int64_t**))                                                \
  FUNCTION(int32_t, aoti_torch_get_dtype, (Handle, int32_t*))                                                 \
  FUNCTION(int32_t, aoti_torch_get_device_type, (Handle, int32_t*))                                           \
  FUNCTION(int32_t, aoti_torch_is_contiguous, (Handle, bool*))                                                \
  FUNCTION(int32_t, aoti_torch_empty_strided,                                                                 \
           (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*))                     \
  FUNCTION(int32_t, aoti_torch_delete_tensor_object, (Handle))                                                \
  FUNCTION(int32_t, torch_string_c_str, (Handle, const char**))                                               \
  FUNCTION(int32_t, torch_delete_string, (Handle))                                                            \
  FUNCTION(int32_t, aoti_torch_device_type_cpu, ())                                                           \
  FUNCTION(int32_t, aoti_torch_dtype_uint8, ())                                                               \
  FUNCTION(int32_t, aoti_torch_dtype_int32, ())                                                               \
  FUNCTION(int32_t, aoti_torch_dtype_int64, ())                                                               \
  FUNCTION(int32_t, aoti_torch_dtype_float32, ())                                                             \
  FUNCTION(int32_t, aoti_torch_dtype_float16, ())                                                             \
  FUNCTION(int32_t, aoti_torch_dtype_bfloat16, ())

struct Torch {
#define MEMBER(result, name, arguments) result(*name) arguments;
  TORCH_FUNCTIONS(MEMBER)
#undef MEMBER
  int32_t cpu, uint8, dtypes[5];  // dtypes: by lowbit_dtype

  // Whether libtorch_cpu.so, which is loaded already, has them all.
  bool find(const char* library) {
    void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return false;
#define FIND(result, name, arguments) \
  if (!(name = reinterpret_cast<result(*) arguments>(dlsym(handle, #name)))) return false;
    TORCH_FUNCTIONS(FIND)
#undef FIND
    const uint64_t spoken = aoti_torch_abi_version();
    if (spoken < kSpoken || spoken >= version(3, 0)) return false;
    cpu = aoti_torch_device_type_cpu();
    uint8 = aoti_torch_dtype_uint8();
    dtypes[LOWBIT_F32] = aoti_torch_dtype_float32();
    dtypes[LOWBIT_F16] = aoti_torch_dtype_float16();
    dtypes[LOWBIT_BF16] = aoti_torch_dtype_bfloat16();
    dtypes[LOWBIT_I32] = aoti_torch_dtype_int32();
    dtypes[LOWBIT_I64] = aoti_torch_dtype_int64();
    return true;
  }
#undef TORCH_FUNCTIONS
};
Torch torch;

// ---- arguments ----

constexpr int64_t kMostDims = 16;

Value box(Handle handle) { return reinterpret_cast<uintptr_t>(handle); }

// Of torch's numbers for dtypes to lowbit's; -1 for one that is none of the two kinds.
int float_dtype(int32_t number) {
  for (const int dtype : {LOWBIT_F32, LOWBIT_F16, LOWBIT_BF16})
    if (torch.dtypes[dtype] == number) return dtype;
  return -1;
}

int id_dtype(int32_t number) {
  for (const int dtype : {LOWBIT_I32, LOWBIT_I64})
    if (torch.dtypes[dtype] == number) return dtype;
  return -1;
}

int position(const char* name, std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* other : names) {
    if (!strcmp(name, other)) return i;
    i++;
  }
  return -1;
}

// A contiguous tensor on the CPU.
struct Tensor {
  void* data = nullptr;
  const int64_t* sizes = nullptr;
  int64_t dims = 0;
  int32_t dtype = -1;

  bool read(Value value) {
    const Handle handle = reinterpret_cast<Handle>(value);
    int32_t device = -1;
    bool contiguous = false;
    int64_t* lengths = nullptr;
    if (torch.aoti_torch_get_device_type(handle, &device) || device != torch.cpu ||
        torch.aoti_torch_is_contiguous(handle, &contiguous) || !contiguous ||
        torch.aoti_torch_get_dtype(handle, &dtype) || torch.aoti_torch_get_dim(handle, &dims) ||
        torch.aoti_torch_get_sizes(handle, &lengths) || torch.aoti_torch_get_data_ptr(handle, &data))
      return false;
    sizes = lengths;
    return true;
  }
};

// An optional argument is NULL or a value on the heap.
const Value* optional(Value value) { return reinterpret_cast<const Value*>(value); }

const char* text(Value value) {
  const char* characters = "";
  return torch.torch_string_c_str(reinterpret_cast<Handle>(value), &characters) ? "" : characters;
}

// codes, scales, zeros, perm as an operator has them, and its format, columns and group size. lowbit checks the rest.
bool read_matrix(const Value* tensors, const Value* layout, lowbit_matrix* w) {
  Tensor codes, scales, zeros, perm;
  constexpr lowbit_format kFormats[] = {LOWBIT_INT2, LOWBIT_INT3, LOWBIT_INT4, LOWBIT_INT8, LOWBIT_TRIT};
  const int format = position(text(layout[0]), {"int2", "int3", "int4", "int8", "trit"});
  if (format < 0 || !codes.read(tensors[0]) || !scales.read(tensors[1])) return false;
  *w = {};
  w->format = kFormats[format];
  w->cols = int64_t(layout[1]);
  w->group_size = int64_t(layout[2]);
  const int scale_dtype = float_dtype(scales.dtype);
  if (codes.dtype != torch.uint8 || codes.dims != 3 || codes.sizes[2] != 64 ||
      codes.sizes[1] != lowbit_row_lines(w->format, w->cols) || scales.dims != 2 || scale_dtype < 0)
    return false;
  w->rows = codes.sizes[0];
  w->codes = static_cast<const uint8_t*>(codes.data);
  w->scales = scales.data;
  w->scale_dtype = lowbit_dtype(scale_dtype);
  w->scale_rows = scales.sizes[0];
  w->scale_cols = scales.sizes[1];
  if (const Value* given = optional(tensors[2])) {
    if (!zeros.read(*given) || zeros.dtype != torch.uint8 || zeros.dims != 2 || zeros.sizes[0] != scales.sizes[0] ||
        zeros.sizes[1] != scales.sizes[1])
      return false;
    w->zeros = static_cast<const uint8_t*>(zeros.data);
  }
  if (const Value* given = optional(tensors[3])) {
    if (!perm.read(*given) || perm.dtype != torch.dtypes[LOWBIT_I32] || perm.dims != 1 || perm.sizes[0] != w->cols)
      return false;
    w->perm = static_cast<const int32_t*>(perm.data);
  }
  return true;
}

// A new tensor of the first `dims` sizes and one more, contiguous.
Handle empty(const int64_t* sizes, int64_t dims, int64_t last, int32_t dtype, void** data) {
  int64_t lengths[kMostDims + 1], strides[kMostDims + 1], stride = 1;
  for (int64_t i = dims; i >= 0; i--) {
    lengths[i] = i == dims ? last : sizes[i];
    strides[i] = stride;
    stride *= lengths[i] > 1 ? lengths[i] : 1;
  }
  Handle made = nullptr;
  if (torch.aoti_torch_empty_strided(dims + 1, lengths, strides, dtype, torch.cpu, 0, &made)) return nullptr;
  if (torch.aoti_torch_get_data_ptr(made, data)) return torch.aoti_torch_delete_tensor_object(made), nullptr;
  return made;
}

int64_t count(const int64_t* sizes, int64_t dims) {
  int64_t product = 1;
  for (int64_t i = 0; i < dims; i++) product *= sizes[i];
  return product;
}

// ---- errors ----

// What the operator in Python raised, kept for the thread until the call is back in Python: an exception that crossed
// torch's C functions would arrive there as another one.
thread_local PyObject* kept = nullptr;

struct KeptError : py::builtin_exception {
  using py::builtin_exception::builtin_exception;
  void set_error() const override {  // on the way into Python, with the GIL
    if (!kept) return PyErr_SetString(PyExc_RuntimeError, what());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(kept)), kept);
    Py_CLEAR(kept);
  }
};

void keep_error(py::object error) {
  Py_XDECREF(kept);
  kept = error.release().ptr();
}

// ---- the operators ----

enum Kind { kNumber, kTensor, kString, kOptionalTensor, kOptionalNumber };

void release(Value value, Kind kind) {
  if (kind == kTensor) torch.aoti_torch_delete_tensor_object(reinterpret_cast<Handle>(value));
  if (kind == kString) torch.torch_delete_string(reinterpret_cast<Handle>(value));
  if ((kind == kOptionalTensor || kind == kOptionalNumber) && value) {
    Value* const inner = reinterpret_cast<Value*>(value);
    if (kind == kOptionalTensor) torch.aoti_torch_delete_tensor_object(reinterpret_cast<Handle>(*inner));
    delete inner;
  }
}

struct Gather {
  static constexpr const char *kName = "gather", *kInPython = "lowbit::_gather";
  enum { kIds, kMatrix, kLayout = 5, kDtype = 8, kPolicy, kPaddingId, kInputs };
  static constexpr Kind kKinds[kInputs] = {kTensor, kTensor, kTensor, kOptionalTensor, kOptionalTensor, kString,
                                           kNumber, kNumber, kNumber, kString,         kOptionalNumber};

  // The output, or NULL for what is not plain.
  static Handle run(const Value* in) {
    Tensor ids;
    lowbit_matrix w;
    const int32_t out_dtype = int32_t(in[kDtype]);
    constexpr lowbit_id_policy kPolicies[] = {LOWBIT_IDS_ERROR, LOWBIT_IDS_ZERO, LOWBIT_IDS_CLAMP};
    const int policy = position(text(in[kPolicy]), {"error", "zero", "clamp"});
    if (in[kPaddingId] || policy < 0 || float_dtype(out_dtype) < 0 || !ids.read(in[kIds]) || ids.dims > kMostDims ||
        id_dtype(ids.dtype) < 0 || !read_matrix(in + kMatrix, in + kLayout, &w))
      return nullptr;
    void* out = nullptr;
    const Handle made = empty(ids.sizes, ids.dims, w.cols, out_dtype, &out);
    if (made && lowbit_gather(&w, ids.data, lowbit_dtype(id_dtype(ids.dtype)), count(ids.sizes, ids.dims),
                              kPolicies[policy], out, lowbit_dtype(float_dtype(out_dtype)), w.cols) == LOWBIT_OK)
      return made;
    if (made) torch.aoti_torch_delete_tensor_object(made);
    return nullptr;
  }
};

struct Matmul {
  static constexpr const char *kName = "matmul", *kInPython = "lowbit::_matmul";
  enum { kX, kMatrix, kBias = 5, kLayout, kActivations = 9, kInputs };
  static constexpr Kind kKinds[kInputs] = {kTensor,         kTensor, kTensor, kOptionalTensor, kOptionalTensor,
                                           kOptionalTensor, kString, kNumber, kNumber,         kString};

  static Handle run(const Value* in) {
    Tensor x, bias;
    lowbit_matrix w;
    constexpr lowbit_activations kModes[] = {LOWBIT_ACT_FLOAT, LOWBIT_ACT_INT8};
    const int mode = position(text(in[kActivations]), {"float", "int8"});
    if (mode < 0 || !x.read(in[kX]) || float_dtype(x.dtype) < 0 || x.dims < 1 || x.dims > kMostDims ||
        !read_matrix(in + kMatrix, in + kLayout, &w) || x.sizes[x.dims - 1] != w.cols)
      return nullptr;
    if (const Value* given = optional(in[kBias]))
      if (!bias.read(*given) || float_dtype(bias.dtype) < 0 || bias.dims != 1 || bias.sizes[0] != w.rows)
        return nullptr;
    const lowbit_dtype dtype = lowbit_dtype(float_dtype(x.dtype));
    void* y = nullptr;
    const Handle made = empty(x.sizes, x.dims - 1, w.rows, x.dtype, &y);
    if (made && lowbit_matmul(&w, x.data, dtype, count(x.sizes, x.dims - 1), w.cols, bias.data,
                              bias.data ? lowbit_dtype(float_dtype(bias.dtype)) : LOWBIT_F32, y, w.rows, kModes[mode],
                              nullptr, 0) == LOWBIT_OK)
      return made;
    if (made) torch.aoti_torch_delete_tensor_object(made);
    return nullptr;
  }
};

// Takes the inputs off the stack and puts the output there.
template <class Operator>
void call(Value* stack, uint64_t inputs, uint64_t) {
  const Handle out = inputs == Operator::kInputs ? Operator::run(stack) : nullptr;
  if (out) {
    for (int i = 0; i < Operator::kInputs; i++) release(stack[i], Operator::kKinds[i]);
    stack[0] = box(out);
    return;
  }
  if (kept) {  // by somebody who called the operator in Python himself
    const py::gil_scoped_acquire held;
    Py_CLEAR(kept);
  }
  if (torch.torch_call_dispatcher(Operator::kInPython, "", stack, kSpoken))
    throw std::runtime_error(std::string(Operator::kInPython) + ": torch could not call it");
  if (!kept) return;
  release(stack[0], kTensor);
  throw KeptError("an operator of lowbit failed");
}

template <class Operator>
bool register_kernel(Handle library) {
  return torch.torch_library_impl(library, Operator::kName, call<Operator>, kSpoken) == 0;
}

// Once a process, and for its whole life.
bool register_torch_kernels(const std::string& libtorch_cpu) {
  static Handle library = nullptr;
  if (library) return true;
  if (!torch.find(libtorch_cpu.c_str()) ||
      torch.aoti_torch_library_init_impl("lowbit", "CPU", "torch_kernels.cpp", 0, &library))
    return false;
  return register_kernel<Gather>(library) && register_kernel<Matmul>(library);
}

}  // namespace

void bind_torch_kernels(py::module_& m) {
  m.def("register_torch_kernels", register_torch_kernels, py::arg("libtorch_cpu"));
  m.def("keep_error", keep_error, py::arg("error"));
}
