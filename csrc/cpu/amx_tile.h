// The tile instructions of AMX and the vector work around them, twice: as the CPU has them, and in
// plain C++, so that one source of a kernel is tested where there is no AMX.
//
// Both offer, with t the rows of an activation tile, and tiles numbered 0..7:
//   Tiles(t)                 configures tiles 0-5 with t rows and 6-7 with 16, each row 64 bytes;
//                            released by the destructor
//   zero<tile>()
//   load<tile>(p, stride)    rows of 64 bytes, `stride` bytes apart
//   store<tile>(p, stride)
//   multiply_add<c, a, b>()  c[m][n] += sum_i a[m][2i] * b[i][2n] + a[m][2i + 1] * b[i][2n + 1]
//                            with c fp32 [t][16], a bf16 [t][32], b bf16 [16][32]
//   kName                    "amx", "amx_emulated"
//   copy_cell(to, from, n)   n <= 32 bf16 numbers and zeros up to 32
//   split_cell(to, bytes, from, n)   n <= 32 fp32 numbers, each split into three bf16 ones (see
//                            amx_factors.h): one cell for each part, `bytes` apart
//   prefetch_to_l2(p), fence()
//   Channels, finish_row     the epilogue of up to 32 neighbouring channels of one pixel
//   finite(sums, rows, n)    whether the first n <= 32 of each row of 32 sums are finite
//
// As the instructions do, both take subnormal factors and sums for zeros, and NaN and infinities
// for what they are; so does the conversion to bf16 at the end. oneDNN, which torch calls, uses the
// same instructions.
//
// Everything has internal linkage, see vec_loop.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/amx_factors.h"
#include "cpu/vec_generic.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fused_resnet::cpu {
namespace {

constexpr int kTileBytes = 1024;      // 16 rows of 64 bytes
constexpr int kMaxTileRows = 16;      // output pixels of a tile
constexpr int kTileChannels = 16;     // output channels of a tile
constexpr int kPanelChannels = 32;    // output channels of two tiles
constexpr int kCellElements = 32;     // factors that one row of a tile holds
constexpr int kCellBytes = 64;        // of bf16
constexpr int kWeightTilesBegin = 6;  // tiles from here on hold weights: 16 rows always

#if defined(__AVX512BF16__)

class AmxTiles {
 public:
  static constexpr const char* kName = "amx";

  explicit AmxTiles(int rows) {
    Config config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kCellBytes;
      config.rows[tile] = static_cast<uint8_t>(tile < kWeightTilesBegin ? rows : kMaxTileRows);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxTiles() { __asm__ volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  // Written out because the intrinsics of some compilers do not say that they access memory.
  template <int kTile>
  void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kC, int kA, int kB>
  void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }

  static void copy_cell(void* to, const uint16_t* from, int count) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, from));
  }

  static void split_cell(std::byte* to, int64_t part_bytes, const float* from, int count) {
    const auto mask = static_cast<uint32_t>((uint64_t{1} << count) - 1);
    __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
    __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16);
    for (int part = 0; part < 2; ++part) {
      const __m512 low_part = rounded(low), high_part = rounded(high);
      store_high_halves(to + part * part_bytes, low_part, high_part);
      low = _mm512_sub_ps(low, low_part);
      high = _mm512_sub_ps(high, high_part);
    }
    store_high_halves(to + 2 * part_bytes, low, high);
    // What is not finite, or rounds to infinity, leaves infinity - infinity.
    if (is_nan(_mm512_add_ps(low, high))) split_one_by_one(to, part_bytes, from, count);
  }

  static void prefetch_to_l2(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

  // Makes streamed stores visible to whoever this thread tells that it is done.
  static void fence() { _mm_sfence(); }

  // Scale and shift of the `count` channels of a panel.
  struct Channels {
    Channels(const float* scales, const float* shifts, int count, bool streams)
        : count(count), streams(streams) {
      for (int i = 0; i < 2; ++i) {
        const int left = std::clamp(count - 16 * i, 0, 16);
        mask[i] = static_cast<__mmask16>((1u << left) - 1);
        scale[i] = _mm512_maskz_loadu_ps(mask[i], scales + 16 * i);
        shift[i] = _mm512_maskz_loadu_ps(mask[i], shifts + 16 * i);
      }
    }
    __m512 scale[2], shift[2];
    __mmask16 mask[2];
    int count;
    bool streams;  // y by stores that pass the caches by, to lines of their own
  };

  // y[0..count) = epilogue(sums, residual) for one pixel.
  template <class Functor>
  static void finish_row(const Channels& channels, const float* sums, const uint16_t* residual,
                         uint16_t* y) {
    if (channels.count == kPanelChannels) {
      __m512i r = _mm512_setzero_si512();
      if constexpr (Functor::kReadsResidual) r = _mm512_loadu_si512(residual);
      const __m512 low = finish<Functor>(channels, 0, sums, widen(_mm512_castsi512_si256(r)));
      const __m512 high =
          finish<Functor>(channels, 1, sums, widen(_mm512_extracti64x4_epi64(r, 1)));
      const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      channels.streams ? _mm512_stream_si512(reinterpret_cast<__m512i*>(y), both)
                       : _mm512_storeu_si512(y, both);
      return;
    }
    for (int i = 0; i < 2 && 16 * i < channels.count; ++i) {
      __m256i r = _mm256_setzero_si256();
      if constexpr (Functor::kReadsResidual) {
        r = _mm256_maskz_loadu_epi16(channels.mask[i], residual + 16 * i);
      }
      const __m512 z = finish<Functor>(channels, i, sums, widen(r));
      _mm256_mask_storeu_epi16(y + 16 * i, channels.mask[i],
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(z)));
    }
  }

  template <class Functor>
  static void finish_row(const Channels& channels, const float* sums, const float* residual,
                         float* y) {
    for (int i = 0; i < 2 && 16 * i < channels.count; ++i) {
      __m512 r = _mm512_setzero_ps();
      if constexpr (Functor::kReadsResidual) {
        r = _mm512_maskz_loadu_ps(channels.mask[i], residual + 16 * i);
      }
      const __m512 z = finish<Functor>(channels, i, sums, r);
      channels.streams ? _mm512_stream_ps(y + 16 * i, z)
                       : _mm512_mask_storeu_ps(y + 16 * i, channels.mask[i], z);
    }
  }

  static bool finite(const float* sums, int rows, int count) {
    const __m512 zero = _mm512_setzero_ps();
    __m512 nan = zero;  // once a product of zero and what is not finite was added
    for (int row = 0; row < rows; ++row, sums += kPanelChannels) {
      nan = _mm512_fmadd_ps(_mm512_load_ps(sums), zero, nan);
      if (count > 16) nan = _mm512_fmadd_ps(_mm512_load_ps(sums + 16), zero, nan);
    }
    return !is_nan(nan);
  }

 private:
  // Operand of ldtilecfg, palette 1.
  struct alignas(64) Config {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Config) == 64);

  // Whether one of them is.
  static bool is_nan(__m512 values) {
    return _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q) != 0;
  }

  // As SplitFactors::rounded.
  static __m512 rounded(__m512 values) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(
        _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  // Pairs of a number of `low` and one of `high`, cut to bf16.
  static void store_high_halves(std::byte* to, __m512 low, __m512 high) {
    const __m512i first = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
    constexpr __mmask32 kOdd = 0xaaaaaaaa;
    _mm512_store_si512(to, _mm512_mask_mov_epi16(first, kOdd, _mm512_castps_si512(high)));
  }

  static __m512 widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }

  // 16 channels; max(0, z) returns its second operand when that is a NaN.
  template <class Functor>
  static __m512 finish(const Channels& channels, int i, const float* sums, __m512 residual) {
    const __m512 zero = _mm512_setzero_ps();
    __m512 z = _mm512_fmadd_ps(_mm512_load_ps(sums + 16 * i), channels.scale[i], channels.shift[i]);
    if constexpr (Functor::kReluFirst) z = _mm512_max_ps(zero, z);
    if constexpr (Functor::kReadsResidual) z = _mm512_add_ps(z, residual);
    if constexpr (Functor::kReluLast) z = _mm512_max_ps(zero, z);
    return z;
  }
};

#endif

class EmulatedTiles {
 public:
  static constexpr const char* kName = "amx_emulated";

  explicit EmulatedTiles(int rows) : rows_(rows) {}

  template <int kTile>
  void load(const void* p, int64_t stride) {
    for (int row = 0; row < rows(kTile); ++row) {
      std::memcpy(tiles_[kTile][row], static_cast<const char*>(p) + row * stride, kCellBytes);
    }
  }
  template <int kTile>
  void store(void* p, int64_t stride) {
    for (int row = 0; row < rows(kTile); ++row) {
      std::memcpy(static_cast<char*>(p) + row * stride, tiles_[kTile][row], kCellBytes);
    }
  }
  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  // The order of sums is that of TDPBF16PS (Intel SDM volume 2): even and odd products apart.
  template <int kC, int kA, int kB>
  void multiply_add() {
    for (int m = 0; m < rows(kA); ++m) {
      float even[16] = {}, odd[16] = {};
      for (int i = 0; i < 16; ++i) {
        for (int n = 0; n < 16; ++n) {
          even[n] = flush(std::fma(bf16(kA, m, 2 * i), bf16(kB, i, 2 * n), even[n]));
          odd[n] = flush(std::fma(bf16(kA, m, 2 * i + 1), bf16(kB, i, 2 * n + 1), odd[n]));
        }
      }
      for (int n = 0; n < 16; ++n) {
        float c;
        std::memcpy(&c, tiles_[kC][m] + 4 * n, 4);
        c = flush(flush(c) + flush(even[n] + odd[n]));
        std::memcpy(tiles_[kC][m] + 4 * n, &c, 4);
      }
    }
  }

  static void copy_cell(void* to, const uint16_t* from, int count) {
    std::memset(to, 0, kCellBytes);
    std::memcpy(to, from, static_cast<size_t>(count) * 2);
  }

  static void split_cell(std::byte* to, int64_t part_bytes, const float* from, int count) {
    split_one_by_one(to, part_bytes, from, count);
  }

  static void prefetch_to_l2(const void*) {}
  static void fence() {}

  struct Channels {
    Channels(const float* scales, const float* shifts, int count, bool)
        : scale(scales), shift(shifts), count(count) {}
    const float* scale;
    const float* shift;
    int count;
  };

  template <class Functor>
  static void finish_row(const Channels& channels, const float* sums, const uint16_t* residual,
                         uint16_t* y) {
    for (int i = 0; i < channels.count; ++i) {
      float r = 0.0f;
      if constexpr (Functor::kReadsResidual) r = generic::bfloat16_to_float(residual[i]);
      const float z = Functor::apply(sums[i], channels.scale[i], channels.shift[i], r);
      y[i] = generic::float_to_bfloat16(flush(z));
    }
  }

  template <class Functor>
  static void finish_row(const Channels& channels, const float* sums, const float* residual,
                         float* y) {
    for (int i = 0; i < channels.count; ++i) {
      float r = 0.0f;
      if constexpr (Functor::kReadsResidual) r = residual[i];
      y[i] = Functor::apply(sums[i], channels.scale[i], channels.shift[i], r);
    }
  }

  static bool finite(const float* sums, int rows, int count) {
    for (int row = 0; row < rows; ++row, sums += kPanelChannels) {
      if (!std::all_of(sums, sums + count, [](float sum) { return std::isfinite(sum); })) {
        return false;
      }
    }
    return true;
  }

 private:
  int rows(int tile) const { return tile < kWeightTilesBegin ? rows_ : kMaxTileRows; }

  static float flush(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? 0.0f : v; }

  float bf16(int tile, int row, int i) const {
    uint16_t bits;
    std::memcpy(&bits, tiles_[tile][row] + 2 * i, 2);
    return flush(generic::bfloat16_to_float(bits));
  }

  int rows_;
  unsigned char tiles_[8][kMaxTileRows][kCellBytes];
};

}  // namespace
}  // namespace fused_resnet::cpu
