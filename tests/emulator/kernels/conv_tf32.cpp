#include "conv.h"

REGISTER_CONV("tf32", Tf32Math)
