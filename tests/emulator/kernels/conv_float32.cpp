#include "conv.h"

REGISTER_CONV("float32", Float32Math)
