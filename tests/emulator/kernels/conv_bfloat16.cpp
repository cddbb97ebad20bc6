#include "conv.h"

REGISTER_CONV("bfloat16", BFloat16Math)
