#include "conv.h"

REGISTER_CONV("float16", Float16Math)
REGISTER_GATHER_PAIRS("float16", Float16Math);
