#include "dispatch/cuda_loader.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "api/status.h"

namespace lowbit {
namespace {

constexpr const char* kLibrary = "liblowbit_cuda.so.0";

struct Loaded {
  const CudaBackend* backend = nullptr;
  std::string why_not;
};

// liblowbit_cuda lies where liblowbit does, in a wheel and in an installed prefix alike.
std::string library_path() {
  if (const char* given = getenv("LOWBIT_CUDA_LIBRARY")) return given;
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&lowbit_abi_version), &info) || !info.dli_fname) return kLibrary;
  const std::string self = info.dli_fname;
  const size_t slash = self.rfind('/');
  return slash == std::string::npos ? kLibrary : self.substr(0, slash + 1) + kLibrary;
}

Loaded load() {
  Loaded loaded;
  const std::string path = library_path();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    loaded.why_not = std::string("the CUDA library could not be opened (") + dlerror() +
                     "); build lowbit where nvcc is found, or with LOWBIT_CUDA=ON to see what is missing";
    return loaded;
  }
  using Entry = const CudaBackend* (*)(int32_t);
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "lowbit_cuda_backend"));
  loaded.backend = entry ? entry(kCudaBackendVersion) : nullptr;
  if (!loaded.backend)
    loaded.why_not = path + ": expected a CUDA library of version " + std::to_string(kCudaBackendVersion) +
                     ", got another; install lowbit anew";
  return loaded;
}

const Loaded& loaded() {
  static const Loaded once = load();
  return once;
}

}  // namespace

lowbit_status cuda_backend(const CudaBackend** backend) {
  *backend = loaded().backend;
  return *backend ? LOWBIT_OK : fail(LOWBIT_UNSUPPORTED, "CUDA: %s", loaded().why_not.c_str());
}

lowbit_status cuda_device(int32_t index, const lowbit_cuda_device** device) {
  const CudaBackend* backend;
  if (const lowbit_status status = cuda_backend(&backend)) return status;
  static std::mutex mutex;
  static std::vector<std::unique_ptr<lowbit_cuda_device>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (index >= 0 && size_t(index) < known.size() && known[size_t(index)]) {
    *device = known[size_t(index)].get();
    return LOWBIT_OK;
  }
  CudaMessage message{};
  int32_t count = 0;
  if (const lowbit_status status = backend->device_count(&count, &message)) return fail(status, "%s", message.text);
  if (index < 0 || index >= count)
    return fail(LOWBIT_INVALID_ARGUMENT, "device: expected an index in [0, %d), got %d", count, index);
  auto found = std::make_unique<lowbit_cuda_device>();
  if (const lowbit_status status = backend->device(index, found.get(), &message))
    return fail(status, "%s", message.text);
  if (known.size() <= size_t(index)) known.resize(size_t(index) + 1);
  known[size_t(index)] = std::move(found);
  *device = known[size_t(index)].get();
  return LOWBIT_OK;
}

}  // namespace lowbit
