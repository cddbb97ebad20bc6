// Direct convolution in AVX-512; bf16 is widened to fp32.

#include "cpu/direct_avx512.h"

#include "cpu/direct_conv.h"
#include "cpu/stem_direct.h"

namespace fused_resnet::cpu {
namespace avx512 {
namespace {

using DirectFloat32 = DirectFloat<Float32>;
using DirectBFloat16 = DirectFloat<BFloat16>;

}  // namespace
}  // namespace avx512

const DirectFunctions kDirectFloat32Avx512 = kDirectFunctions<avx512::DirectFloat32>;
const DirectFunctions kDirectBFloat16Avx512 = kDirectFunctions<avx512::DirectBFloat16>;

const StemFunctions kStemFloat32Avx512 = kStemFunctions<DirectRows<avx512::DirectFloat32>>;
const StemFunctions kStemBFloat16Avx512 = kStemFunctions<DirectRows<avx512::DirectBFloat16>>;

}  // namespace fused_resnet::cpu
