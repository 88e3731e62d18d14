// AdamW, averages of the weights, loss scale, clipping and a copy in half precision, in one pass over a list of tensors: an
// element is read 5 times (weight, gradient, two moments, average) and written 4 times, 36 bytes in all, 8 for each further
// average, 2 for the copy. And the norm of a list of gradients: 4 bytes read per element.
//
// Tasks are chunks of a fixed size, so that results do not depend on the number of threads.
#include <cmath>
#include <vector>

#include "element.h"

namespace erdfast::ERDFAST_ARCH {
namespace {

constexpr int64_t CHUNK = 16384;         // elements of a task: 64 KB an array, many tasks for every thread
constexpr int64_t PIECE = 512;           // elements that stay in the first-level cache between the loops over them
constexpr int64_t SERIAL_CHUNK = 16384;  // elements below which waking a second thread costs more than it saves

struct Task {
  int64_t tensor, begin, count;
};

inline std::vector<Task> make_tasks(int64_t tensors, const int64_t* numel) {
  std::vector<Task> tasks;
  for (int64_t t = 0; t < tensors; ++t)
    for (int64_t begin = 0; begin < numel[t]; begin += CHUNK) tasks.push_back({t, begin, std::min(CHUNK, numel[t] - begin)});
  return tasks;
}

template <class Run>
inline void run_tasks(const std::vector<Task>& tasks, int threads, Run run) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  int64_t elements = 0;
  for (const Task& task : tasks) elements += task.count;
  if (threads < 2 || elements < SERIAL_CHUNK) {
    for (int64_t i = 0; i < count; ++i) run(i, tasks[i]);
    return;
  }
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)  // a core may be busy elsewhere
  for (int64_t i = 0; i < count; ++i) run(i, tasks[i]);
}

// Gradients [begin, begin + count) as float32: where they are, or converted into `buffer`.
inline const float* gradient(const void* data, Dtype dtype, int64_t begin, int64_t count, float* __restrict buffer) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(data) + begin;
  const uint16_t* __restrict half = static_cast<const uint16_t*>(data) + begin;
  if (dtype == Dtype::bf16) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = bits_to_float(static_cast<uint32_t>(half[i]) << 16);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = half_to_float(half[i]);
  }
  return buffer;
}

// base + coef*(b - a), which is a + weight*(b - a) with a rounding error that is small beside the result.
struct Lerp {
  bool near_a;
  float coef;
  explicit Lerp(double weight) : near_a(weight < 0.5), coef(static_cast<float>(near_a ? weight : weight - 1.0)) {}
  float operator()(float a, float b) const { return (near_a ? a : b) + coef * (b - a); }
};

// What the elements of a tensor share.
struct Update {
  bool active;
  Lerp first;
  float factor, beta2, weight2, inverse_root, eps, step_size, decay;

  Update(const AdamwEma& op, int64_t t, float clip)
      : active(op.grad[t] && !(op.found_inf && *op.found_inf != 0.0f)), first(1.0 - group(op, t)[1]) {
    const double lr = group(op, t)[0], beta1 = group(op, t)[1], second = group(op, t)[2];
    const double step = active ? static_cast<double>(*op.step[t] += 1.0f) : 1.0;
    factor = clip;
    beta2 = static_cast<float>(second);
    weight2 = static_cast<float>(1.0 - second);
    inverse_root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(second, step)));
    eps = static_cast<float>(group(op, t)[3]);
    step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
    decay = static_cast<float>(1.0 - lr * group(op, t)[4]);
  }

  static const double* group(const AdamwEma& op, int64_t t) { return op.settings + 5 * op.group[t]; }

  void run(int64_t count, const float* __restrict grad, float* __restrict p, float* __restrict m, float* __restrict v) const {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float g = grad[i] * factor;
      const float mean = first(m[i], g);
      const float square = beta2 * v[i] + weight2 * (g * g);
      m[i] = mean;
      v[i] = square;
      p[i] = p[i] * decay - step_size * (mean / (std::sqrt(square) * inverse_root + eps));
    }
  }
};

inline void average(Lerp lerp, int64_t count, const float* __restrict p, float* __restrict ema) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) ema[i] = lerp(ema[i], p[i]);
}

inline void copy(Dtype dtype, int64_t count, const float* __restrict p, uint16_t* __restrict out) {
  if (dtype == Dtype::bf16) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = float_to_bfloat(p[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = float_to_half(p[i]);
  }
}

}  // namespace

void adamw_ema(const AdamwEma& op) {
  // As torch.nn.utils.clip_grad_norm_ does; the norm is of gradients without the loss scale.
  float factor = op.norm ? std::min(1.0f, static_cast<float>(op.max_norm) / (*op.norm + 1e-6f)) : 1.0f;
  if (op.norm && std::isnan(*op.norm)) factor = *op.norm;
  if (op.grad_scale) factor /= *op.grad_scale;
  std::vector<Update> updates;
  for (int64_t t = 0; t < op.tensors; ++t) updates.emplace_back(op, t, factor);
  std::vector<Lerp> averages;
  for (int64_t k = 0; k < op.emas; ++k) averages.emplace_back(op.settings[5 * op.groups + k]);

  const auto run = [&](int64_t, const Task& task) {
    alignas(64) float buffer[PIECE];
    const int64_t t = task.tensor, end = task.begin + task.count;
    for (int64_t begin = task.begin; begin < end; begin += PIECE) {
      const int64_t count = std::min(PIECE, end - begin);
      float* p = op.param[t] + begin;
      if (updates[t].active) {
        const float* grad = gradient(op.grad[t], op.grad_dtype, begin, count, buffer);
        updates[t].run(count, grad, p, op.exp_avg[t] + begin, op.exp_avg_sq[t] + begin);
      }
      for (int64_t k = 0; k < op.emas; ++k) average(averages[k], count, p, op.ema[k * op.tensors + t] + begin);
      if (op.copy) copy(op.copy_dtype, count, p, op.copy[t] + begin);
    }
  };
  run_tasks(make_tasks(op.tensors, op.numel), op.threads, run);
}

void grad_norm(const GradNorm& op) {
  std::vector<int64_t> numel(op.numel, op.numel + op.tensors);
  for (int64_t t = 0; t < op.tensors; ++t)
    if (!op.grad[t]) numel[t] = 0;
  const std::vector<Task> tasks = make_tasks(op.tensors, numel.data());
  std::vector<double> partial(tasks.size());
  run_tasks(tasks, op.threads, [&](int64_t i, const Task& task) {
    alignas(64) float buffer[PIECE];
    const int64_t end = task.begin + task.count;
    double total = 0.0;
    for (int64_t begin = task.begin; begin < end; begin += PIECE) {
      const int64_t count = std::min(PIECE, end - begin);
      const float* grad = gradient(op.grad[task.tensor], op.grad_dtype, begin, count, buffer);
      double sum = 0.0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < count; ++j) sum += static_cast<double>(grad[j]) * static_cast<double>(grad[j]);
      total += sum;
    }
    partial[i] = total;
  });
  double total = 0.0;
  for (const double sum : partial) total += sum;
  *op.out = static_cast<float>(std::sqrt(total));
}

}  // namespace erdfast::ERDFAST_ARCH
