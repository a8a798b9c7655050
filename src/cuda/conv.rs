//! Launches of `kernels/conv.cu`.
