// Walks a batch in blocks of 4*LANES elements and hands each block's x0 and eps to a visitor.
#pragma once
#include <algorithm>
#include <vector>

#include "element.h"

namespace erdfast::ERDFAST_ARCH {

constexpr uint64_t POSTERIOR_DOMAIN = 0x5851F42D4C957F2Dull;  // erdfast.philox.DOMAINS["posterior"]
constexpr int64_t SERIAL_ELEMENTS = 16384;  // 25 microseconds of work: waking a second thread costs as much
constexpr int64_t LANES_PER_TASK = 1024;  // 4096 elements: 16 KB of fp32 an array, many tasks for every thread

// Offset and count of part j of the block that starts at lane q.
struct Layout {
  int64_t numel, quarter;
  bool contiguous;  // explicit noise: elements need no lanes, so a block is 4*LANES neighbours and memory streams

  explicit Layout(const Source& source)
      : numel(source.numel),
        quarter((source.numel + 3) / 4),
        contiguous(source.noise.data != nullptr && !source.moments) {}

  int64_t offset(int64_t q, int j) const { return contiguous ? 4 * q + j * LANES : q + j * quarter; }

  int count(int64_t q, int j) const {
    const int64_t left = contiguous ? numel - offset(q, j) : std::min(quarter, numel - j * quarter) - q;
    return static_cast<int>(std::clamp<int64_t>(left, 0, LANES));
  }
};

// x0[j] and eps[j] hold the LANES elements of part j; lanes beyond its count are 0.
struct Block {
  const float* x0[4];
  const float* eps[4];
  alignas(64) float x0_buffer[4][LANES];
  alignas(64) float eps_buffer[4][LANES];
};

inline void clear_beyond(int count, float* lanes) {
  for (int i = count; i < LANES; ++i) lanes[i] = 0.0f;
}

inline void read_block(const Source& source, const Layout& layout, int64_t b, int64_t q, Block& block) {
  const int lanes = static_cast<int>(std::min<int64_t>(layout.quarter - q, LANES));
  const uint64_t id = static_cast<uint64_t>(source.sample_ids ? source.sample_ids[b] : b);
  if (!source.noise.data) NoiseStream{source.seed, id, source.stream}.fill(static_cast<uint32_t>(q), lanes, block.eps_buffer);
  alignas(64) float eta[4][LANES];
  if (source.moments)
    NoiseStream{source.seed ^ POSTERIOR_DOMAIN, id, source.stream}.fill(static_cast<uint32_t>(q), lanes, eta);

  for (int j = 0; j < 4; ++j) {
    const int64_t offset = layout.offset(q, j);
    const int count = layout.count(q, j);
    block.eps[j] = block.eps_buffer[j];
    if (source.noise.data)
      block.eps[j] = view(source.noise, b, offset, count, block.eps_buffer[j]);
    else
      clear_beyond(count, block.eps_buffer[j]);
    if (!source.moments) {
      block.x0[j] = view(source.x0, b, offset, count, block.x0_buffer[j]);
      continue;
    }
    alignas(64) float mean[LANES];
    alignas(64) float std[LANES];
    load(source.x0, b, offset, count, mean);
    load(source.x0, b, offset + source.numel, count, std);
    clear_beyond(count, eta[j]);
    float* x0 = block.x0_buffer[j];
#pragma omp simd simdlen(16)
    for (int i = 0; i < LANES; ++i) x0[i] = source.moments_scale * (mean[i] + std[i] * eta[j][i]);
    block.x0[j] = x0;
  }
}

inline int64_t tasks_per_sample(const Layout& layout) {
  return (layout.quarter + LANES_PER_TASK - 1) / LANES_PER_TASK;
}

// visit(task, b, q_begin, q_end) for every task of the batch, in parallel. The partition depends on the size of a sample
// alone, so results do not depend on the number of threads.
template <class Visit>
inline void for_each_task(const Source& source, const Layout& layout, Visit visit) {
  const int64_t per_sample = tasks_per_sample(layout), tasks = source.batch * per_sample;
  const auto run = [&](int64_t task) {
    const int64_t begin = task % per_sample * LANES_PER_TASK;
    visit(task, task / per_sample, begin, std::min(begin + LANES_PER_TASK, layout.quarter));
  };
  if (source.threads < 2 || source.batch * source.numel < SERIAL_ELEMENTS) {
    for (int64_t task = 0; task < tasks; ++task) run(task);
    return;
  }
#pragma omp parallel for schedule(dynamic, 8) num_threads(source.threads)  // a core may be busy elsewhere
  for (int64_t task = 0; task < tasks; ++task) run(task);
}

}  // namespace erdfast::ERDFAST_ARCH
