//! Launches of `kernels/attention.cu`.
