// Python bindings: addresses and sizes in, nothing out. erdfast/ops checks shapes, dtypes and contiguity before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace py = pybind11;
using namespace erdfast;

namespace {

struct Isa {
  const char* name;
  void (*add_noise)(const AddNoise&);
  void (*diffusion_loss)(const DiffusionLoss&);
};

std::vector<Isa> supported() {  // slowest first
  std::vector<Isa> isas = {{"baseline", baseline::add_noise, baseline::diffusion_loss}};
#ifdef ERDFAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    isas.push_back({"avx2", avx2::add_noise, avx2::diffusion_loss});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    isas.push_back({"avx512", avx512::add_noise, avx512::diffusion_loss});
#endif
  return isas;
}

const Isa& select(const std::string& name) {  // "" is the fastest
  static const std::vector<Isa> isas = supported();
  if (name.empty()) return isas.back();
  std::string names;
  for (const Isa& isa : isas) {
    if (name == isa.name) return isa;
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw py::value_error("instruction set '" + name + "' is not available on this processor; choose from " + names);
}

Array array(uintptr_t address, int dtype) { return {reinterpret_cast<void*>(address), static_cast<Dtype>(dtype)}; }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of erdfast; see erdfast.ops for the public interface.";

  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "Uninitialised bytes from a pool; see csrc/pool.h.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& buffer) {
        return py::buffer_info(static_cast<uint8_t*>(buffer.data()), static_cast<py::ssize_t>(buffer.bytes()));
      });

  py::class_<Source>(m, "Source")
      .def(py::init([](uintptr_t x0, int x0_dtype, uintptr_t noise, int noise_dtype, bool moments, float moments_scale,
                       uint64_t seed, uint32_t stream, uintptr_t sample_ids, int64_t batch, int64_t numel, int threads) {
             return Source{array(x0, x0_dtype), array(noise, noise_dtype), moments, moments_scale, seed, stream,
                           pointer<const int64_t>(sample_ids), batch, numel, threads};
           }),
           py::kw_only(), py::arg("x0"), py::arg("x0_dtype"), py::arg("noise"), py::arg("noise_dtype"),
           py::arg("moments"), py::arg("moments_scale"), py::arg("seed"), py::arg("stream"), py::arg("sample_ids"),
           py::arg("batch"), py::arg("numel"), py::arg("threads"));

  m.def(
      "add_noise",
      [](const Source& source, uintptr_t out, int out_dtype, uintptr_t alpha, uintptr_t sigma, const std::string& isa) {
        const AddNoise op{source, array(out, out_dtype), pointer<const float>(alpha), pointer<const float>(sigma)};
        const auto run = select(isa).add_noise;
        py::gil_scoped_release release;
        run(op);
      },
      py::arg("source"), py::kw_only(), py::arg("out"), py::arg("out_dtype"), py::arg("alpha"), py::arg("sigma"),
      py::arg("isa") = "");

  m.def(
      "diffusion_loss",
      [](const Source& source, uintptr_t pred, int pred_dtype, uintptr_t c_x, uintptr_t c_eps, uintptr_t w,
         uintptr_t sums, uintptr_t grad, double grad_scale, const std::string& isa) {
        const DiffusionLoss op{source, array(pred, pred_dtype), pointer<const float>(c_x), pointer<const float>(c_eps),
                               pointer<const float>(w), pointer<float>(sums), array(grad, pred_dtype), grad_scale};
        const auto run = select(isa).diffusion_loss;
        py::gil_scoped_release release;
        run(op);
      },
      py::arg("source"), py::kw_only(), py::arg("pred"), py::arg("pred_dtype"), py::arg("c_x"), py::arg("c_eps"),
      py::arg("w"), py::arg("sums"), py::arg("grad"), py::arg("grad_scale"), py::arg("isa") = "");

  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : supported()) names.emplace_back(isa.name);
    return names;
  }, "Instruction sets that this processor can run, slowest first.");
}
