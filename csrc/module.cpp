// Python bindings: addresses and sizes in, nothing out. erdfast/ops checks shapes, dtypes and contiguity before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
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
  void (*adamw_ema)(const AdamwEma&);
  void (*grad_norm)(const GradNorm&);
};

std::vector<Isa> supported() {  // slowest first
  std::vector<Isa> isas = {{"baseline", baseline::add_noise, baseline::diffusion_loss, baseline::adamw_ema, baseline::grad_norm}};
#ifdef ERDFAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    isas.push_back({"avx2", avx2::add_noise, avx2::diffusion_loss, avx2::adamw_ema, avx2::grad_norm});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    isas.push_back({"avx512", avx512::add_noise, avx512::diffusion_loss, avx512::adamw_ema, avx512::grad_norm});
#endif
  return isas;
}

// What the environment asks for by ERDFAST_CPU_ISA (baseline, avx2, avx512), else the fastest. Read here at every call:
// os.environ would take longer than all the rest of a call's bindings.
const Isa& select() {
  static const std::vector<Isa> isas = supported();
  const char* asked = std::getenv("ERDFAST_CPU_ISA");
  const std::string name = asked ? asked : "";
  if (name.empty()) return isas.back();
  std::string names;
  for (const Isa& isa : isas) {
    if (name == isa.name) return isa;
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw py::value_error("instruction set '" + name + "' is not available on this processor; choose from " + names);
}

Array array(uintptr_t address, int dtype, int64_t stride, int64_t pixel, int64_t pixels) {
  return {reinterpret_cast<void*>(address), static_cast<Dtype>(dtype), stride, pixel, pixels};
}

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

  // The arguments are many and the calls frequent: they are positional, in the order of the structs. An array is its
  // address, dtype, stride and pixel (ops.h).
  py::class_<Source>(m, "Source", "Clean data and noise of a batch: two arrays, then what ops.h says.")
      .def(py::init([](uintptr_t x0, int x0_dtype, int64_t x0_stride, int64_t x0_pixel, uintptr_t noise,
                       int noise_dtype, int64_t noise_stride, int64_t noise_pixel, int64_t pixels, bool moments,
                       float moments_scale, uint64_t seed, uint32_t stream, uintptr_t sample_ids, int64_t batch,
                       int64_t numel, int threads) {
        return Source{array(x0, x0_dtype, x0_stride, x0_pixel, pixels),
                      array(noise, noise_dtype, noise_stride, noise_pixel, pixels), moments, moments_scale, seed, stream,
                      pointer<const int64_t>(sample_ids), batch, numel, threads};
      }));

  m.def("add_noise", [](const Source& source, uintptr_t out, int out_dtype, int64_t out_stride, int64_t out_pixel,
                        uintptr_t alpha, uintptr_t sigma) {
    const AddNoise op{source, array(out, out_dtype, out_stride, out_pixel, source.x0.pixels),
                      pointer<const float>(alpha), pointer<const float>(sigma)};
    const auto run = select().add_noise;
    py::gil_scoped_release release;
    run(op);
  });

  m.def("diffusion_loss", [](const Source& source, uintptr_t pred, int dtype, int64_t pred_stride, int64_t pred_pixel,
                             uintptr_t c_x, uintptr_t c_eps, uintptr_t w, uintptr_t sums, uintptr_t loss,
                             uintptr_t grad, int64_t grad_stride, int64_t grad_pixel, double grad_scale) {
    const int64_t pixels = source.x0.pixels;
    const DiffusionLoss op{source, array(pred, dtype, pred_stride, pred_pixel, pixels), pointer<const float>(c_x),
                           pointer<const float>(c_eps), pointer<const float>(w), pointer<float>(sums),
                           pointer<float>(loss), array(grad, dtype, grad_stride, grad_pixel, pixels), grad_scale};
    const auto run = select().diffusion_loss;
    py::gil_scoped_release release;
    run(op);
  });

  // `table` is (7 + emas [+ 1], tensors) int64: numel, group, first block, param, exp_avg, exp_avg_sq, step, averages, copy.
  m.def("adamw_ema", [](uintptr_t table, int64_t tensors, int64_t emas, bool copies, int copy_dtype, uintptr_t grads,
                        int grad_dtype, uintptr_t settings, int64_t groups, uintptr_t grad_scale, uintptr_t found_inf,
                        uintptr_t norm, double max_norm, int threads) {
    const auto row = [&](int64_t i) { return table + i * tensors * sizeof(int64_t); };
    AdamwEma op;
    op.tensors = tensors;
    op.emas = emas;
    op.numel = pointer<const int64_t>(row(0));
    op.group = pointer<const int64_t>(row(1));
    op.param = pointer<float* const>(row(3));
    op.exp_avg = pointer<float* const>(row(4));
    op.exp_avg_sq = pointer<float* const>(row(5));
    op.step = pointer<float* const>(row(6));
    op.ema = pointer<float* const>(row(7));
    op.copy = copies ? pointer<uint16_t* const>(row(7 + emas)) : nullptr;
    op.copy_dtype = static_cast<Dtype>(copy_dtype);
    op.grad = pointer<const void* const>(grads);
    op.grad_dtype = static_cast<Dtype>(grad_dtype);
    op.settings = pointer<const double>(settings);
    op.groups = groups;
    op.grad_scale = pointer<const float>(grad_scale);
    op.found_inf = pointer<const float>(found_inf);
    op.norm = pointer<const float>(norm);
    op.max_norm = max_norm;
    op.threads = threads;
    const auto run = select().adamw_ema;
    py::gil_scoped_release release;
    run(op);
  });

  m.def("grad_norm", [](uintptr_t out, uintptr_t numel, uintptr_t grads, int64_t tensors, int grad_dtype, int threads) {
    const GradNorm op{tensors, pointer<const int64_t>(numel), pointer<const void* const>(grads),
                      static_cast<Dtype>(grad_dtype), pointer<float>(out), threads};
    const auto run = select().grad_norm;
    py::gil_scoped_release release;
    run(op);
  });

  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : supported()) names.emplace_back(isa.name);
    return names;
  }, "Instruction sets that this processor can run, slowest first.");
}
