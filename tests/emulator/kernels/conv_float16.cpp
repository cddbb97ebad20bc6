#include "conv.h"

REGISTER_CONV("float16", Float16Math)
