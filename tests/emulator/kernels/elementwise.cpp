#include "add_relu.cuh"
#include "global_average_pool.cuh"
#include "layout.cuh"
#include "register.h"

using namespace fused_resnet::device;

#define REGISTER_ELEMENTWISE(name, T)                                                           \
  EMULATOR_KERNEL("add_relu<" name ">", add_relu<T>);                                           \
  EMULATOR_KERNEL("global_average_pool<" name ">", global_average_pool<T, kVectorElements<T>>); \
  EMULATOR_KERNEL("global_average_pool<" name ",scalar>", global_average_pool<T, 1>);           \
  EMULATOR_KERNEL("transpose<" name ">", transpose<T>)

REGISTER_ELEMENTWISE("float32", float);
REGISTER_ELEMENTWISE("float16", __half);
REGISTER_ELEMENTWISE("bfloat16", __nv_bfloat16);
