#include "conv.h"

REGISTER_CONV("bfloat16", BFloat16Math)
REGISTER_GATHER_PAIRS("bfloat16", BFloat16Math);
