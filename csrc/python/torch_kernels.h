#pragma once

#include <pybind11/pybind11.h>

void bind_torch_kernels(pybind11::module_& m);
